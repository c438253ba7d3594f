import pytest
import torch
from torch import nn

from stablekd_fast.blocks import pair_blocks
from stablekd_fast.blocks.modes import evaluation_mode
from stablekd_fast.blocks.trace import trace
from stablekd_fast.errors import CutError


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return x + self.conv(x).relu()


class Dropper(nn.Module):
    """Reads its training flag in Python, as stochastic depth does; has a child, so it is no natural leaf."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Identity()

    def forward(self, x):
        return self.inner(x) * 3 if self.training else self.inner(x)


class Stubborn(nn.Module):
    """Cannot be followed by fx: decides on data."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Identity()

    def forward(self, x):
        return self.inner(x) if x.sum() > 0 else -self.inner(x)


def network(*middle: nn.Module, width: int = 4) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), *middle, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5)
    )


IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_inside_a_residual_branch_is_no_cut():
    names = [alias for point in trace(network(Residual(4)), IMAGES).points for alias in point.aliases]
    assert "1" in names and "1.conv" not in names


def test_segments_compose_to_the_network():
    model = network(Residual(4), nn.BatchNorm2d(4), Residual(4)).eval()
    traced = trace(model, IMAGES)
    for i in range(len(traced.points) - 1):
        x = IMAGES
        for part in traced.split([traced.points[i], traced.points[i + 1]]):
            x = part(x)
        assert torch.equal(x, model(IMAGES))


def test_flops_are_counted_per_image():
    traced = trace(network(), IMAGES)
    conv, linear = 2 * 8 * 8 * 4 * 3 * 9, 2 * 4 * 5
    assert traced.points[0].flops == conv
    assert traced.flops == conv + linear


def test_a_training_flag_is_honoured_after_tracing():
    model = network(Dropper())
    x = IMAGES
    parts = trace(model, IMAGES).split([])
    model.train()
    assert torch.equal(parts[0](x), model(x))
    in_training = parts[0](x)
    model.eval()
    assert torch.equal(parts[0](x), model(x))
    assert not torch.equal(parts[0](x), in_training)


def test_a_module_that_cannot_be_followed_stays_whole():
    model = network(Residual(4), Stubborn(), Residual(4)).eval()
    traced = trace(model, IMAGES)
    assert "2" in [point.name for point in traced.points]
    assert torch.equal(traced.split([])[0](-IMAGES), model(-IMAGES))


def test_a_root_that_branches_on_training_is_refused():
    class TwoFaced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = network(), network()

        def forward(self, x):
            return self.a(x) + self.b(x) if self.training else self.a(x)

    with pytest.raises(CutError, match="train and eval mode.*teacher_blocks="):
        trace(TwoFaced(), IMAGES)


def test_evaluation_mode_restores_every_flag():
    model = network(nn.BatchNorm2d(4))
    model[1].eval()
    with evaluation_mode(model):
        assert not any(module.training for module in model.modules())
    assert model.training and model[0].training and not model[1].training


def test_channels_last_layouts_are_recognised():
    torchvision = pytest.importorskip("torchvision")
    points = trace(torchvision.models.swin_t(num_classes=5), torch.randn(2, 3, 64, 64)).points
    axes = {point.name: point.layout.channel_axis for point in points}
    assert axes["features.0.0"] == 1 and axes["features.1"] == -1 and axes["features.3"] == -1
    assert axes["permute"] == 1


def test_dense_connections_leave_only_the_cuts_between_them():
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            return self.b(torch.cat([x, self.a(x)], 1))

    points = [point.name for point in trace(network(Dense()), IMAGES).points]
    assert "1" in points and "1.a" not in points


def test_pairing_reports_an_untraceable_model():
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network()

        def forward(self, x):
            return self.body(x) if x.mean() > 0 else self.body(-x)

    with pytest.raises(CutError, match=r"Root cannot be followed \(.*depends on the images\), so .*student_blocks="):
        pair_blocks(network(), Root(), IMAGES)


class WithFeatures(nn.Module):
    """Returns its value before the activation too, as the last block of a stage does in some repositories."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x):
        before = self.norm(self.conv(x))
        return before.relu(), before


class LogitsOfSeveral(nn.Module):
    """Logits out of a network that also uses a layer again for a feature, and branches on the size of its images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stage, self.fc = nn.Conv2d(3, 4, 3, padding=1), WithFeatures(), nn.Linear(4, 5)

    def forward(self, images):
        height = images.shape[2]
        x, before = self.stage(self.stem(images))
        pooled = x.mean((2, 3)) if height < 64 else x.amax((2, 3))
        features = [before, self.stage.norm(x)]
        return (self.fc(pooled), features)[0]


def test_what_the_logits_do_not_depend_on_is_no_part_of_a_block():
    model = LogitsOfSeveral().eval()
    traced = trace(model, IMAGES)
    assert {"stem", "stage"} <= {point.name for point in traced.points}
    called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert called.count("stage.norm") == 1
    for count in (2, 3):
        images = torch.randn(count, 3, 8, 8)
        (whole,) = traced.split([])
        assert torch.equal(whole(images), model(images))


class Tokens(nn.Module):
    """Patches as tokens, and blocks over them: attention between tokens, of any width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.one, self.two = (nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU()) for _ in range(2))
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.one(x)
        x = x + self.two(x)
        return self.head(x.mean(1))


def test_tokens_of_different_widths_are_bridged_along_their_channels():
    """On 16 pixels there are 16 tokens: as many as the student has channels."""
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    for teacher_width, student_width in ((24, 16), (16, 24), (20, 12)):
        teacher, student = Tokens(teacher_width).eval(), Tokens(student_width)
        paired = pair_blocks(teacher, student, images, cuts=["add", "add_1"])
        assert len(paired.cuts) == 2
        for k, cut in enumerate(paired.cuts):
            assert (cut.teacher_channel_axis, cut.student_channel_axis) == (-1, -1)
            assert (cut.teacher_shape, cut.student_shape) == ((16, teacher_width), (16, student_width))
            assert paired.teacher_outputs(images, {k})[k].shape == (4, 16, student_width)


class LastChannels(nn.Module):
    """Maps `[N, 8, 8, 8]` with the channels last, by the Linear that makes them."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.conv, self.layer, self.head = nn.Conv2d(3, 8, 1), layer, nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.layer(self.conv(x).permute(0, 2, 3, 1)).mean((1, 2)))


@pytest.mark.parametrize("layer", [nn.Linear(8, 8), nn.LayerNorm(8)])
def test_where_height_and_width_are_as_many_as_channels_the_layer_says_which_are_which(layer):
    [axis] = {
        point.layout.channel_axis for point in trace(LastChannels(layer), IMAGES).points if "layer" in point.aliases
    }
    assert axis == -1


class LateLinear(nn.Module):
    """Channels first, as the convolution has them; a Linear of the same width lies nearer, behind another layout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.steps = nn.Conv2d(3, 8, 1), nn.Sequential(*[nn.ReLU() for _ in range(4)])
        self.linear, self.head = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.steps(self.conv(x))
        return self.head(self.linear(x.permute(0, 2, 3, 1)).mean((1, 2)))


def test_a_layout_is_not_looked_for_beyond_another_shape():
    net, images = LateLinear(), torch.randn(2, 3, 8, 8)
    points = {alias: point for point in trace(net, images).points for alias in point.aliases}
    assert points["steps"].layout.channel_axis == 1 and points["linear"].layout.channel_axis == -1


def test_a_layout_is_not_looked_for_behind_pooling():
    """The classifier is nearer than the convolution, and as wide as the map."""
    steps = nn.Sequential(*[nn.ReLU() for _ in range(6)])
    net = nn.Sequential(nn.Conv2d(3, 8, 1), steps, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    points = {alias: point for point in trace(net, IMAGES).points for alias in point.aliases}
    assert points["1"].layout.channel_axis == 1
