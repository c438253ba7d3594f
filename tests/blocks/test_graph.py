"""What a trace must not change: in-place operations, flags, random draws, hooks, sizes and optional arguments."""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from stablekd_fast.blocks import PairedBlocks, pair_blocks
from stablekd_fast.blocks.graph import follow
from stablekd_fast.blocks.trace import trace
from stablekd_fast.errors import CutError, ModelError
from stablekd_fast.models.outputs import logits_of

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A stem, two layers and a head; subclasses say what happens between."""

    def __init__(self, width=4):
        super().__init__()
        self.stem, self.one = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.two, self.fc = nn.Conv2d(width, width, 3, 2, padding=1), nn.Linear(width, 5)

    def head(self, x):
        return self.fc(x.mean((2, 3)))

    def forward(self, x):
        return self.head(self.two(self.between(self.one(self.stem(x)))))

    def between(self, x):
        return x


class ReluAfterwards(Net):
    def between(self, x):
        return F.relu(x, inplace=True)


class ReluUnused(Net):
    def between(self, x):
        x.relu_()
        return x


class AddedToAView(Net):
    def between(self, x):
        x[:, 0].add_(1.0)
        return x


class DroppedInPlace(Net):
    def __init__(self, width=4):
        super().__init__(width)
        self.drop = nn.Dropout(0.5, inplace=True)

    def between(self, x):
        return self.drop(x)


class FlagInAHelper(Net):
    def head(self, x):
        return self.fc(F.dropout(x.mean((2, 3)), 0.5, self.training))


class FlagByName(Net):
    def between(self, x):
        return F.dropout(x, p=0.5, inplace=True, training=self.training)


class Noise(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Identity()

    def forward(self, x):
        return self.inner(x) * (1 + torch.rand(1))


class Noisy(Net):
    """The random number depends on nothing that is traced: a trace would draw it once and for all."""

    def __init__(self, width=4):
        super().__init__(width)
        self.noise = Noise()

    def between(self, x):
        return self.noise(x)


class NormalisesItsInput(Net):
    def forward(self, x):
        x.sub_(0.5)
        return super().forward(x)


class SizesBeside(Net):
    """A mask that depends on sizes alone is used at both ends."""

    def forward(self, x):
        count, side = x.size(0), x.shape[2]
        mask = torch.linspace(0, 1, side).view(1, 1, 1, side)
        x = self.between(self.one(self.stem(x) * mask))
        return self.head(self.two(x * mask)).view(count, -1)


KINDS = [
    ReluAfterwards, ReluUnused, AddedToAView, DroppedInPlace, FlagInAHelper, FlagByName, Noisy,
    NormalisesItsInput, SizesBeside,
]  # fmt: skip


def _keep_in(kept):
    return lambda module, given, output: kept.append(output.detach().clone())


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_do_what_the_network_does(kind):
    """At every cut at once, in both modes and for another number of images: outputs to the bit, the network's own
    activations at the cuts, and gradients."""
    torch.manual_seed(0)
    model = kind().double()
    traced = trace(model.float(), IMAGES)
    model.double()
    parts = traced.split(list(traced.points))
    assert {"stem", "one"} <= {alias for point in traced.points for alias in point.aliases}
    holder, images = nn.ModuleList([model, *parts]), torch.randn(3, 3, 8, 8, dtype=torch.float64)
    for training in (False, True):
        holder.train(training)
        kept = []
        hook = model.one.register_forward_hook(_keep_in(kept))
        torch.manual_seed(3)
        plain = model(images.clone())
        hook.remove()
        wanted = torch.autograd.grad(plain.square().sum(), list(model.parameters()))
        torch.manual_seed(3)
        x, outputs = images, []
        for part in parts:
            x = part(x)
            outputs.append(x)
        assert torch.equal(x, plain)
        [one] = [k for k, point in enumerate(traced.points) if "one" in point.aliases]
        assert torch.equal(outputs[one], kept[0]), "the output at the cut was overwritten"
        for got, expected in zip(torch.autograd.grad(x.square().sum(), list(model.parameters())), wanted):
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_images_are_not_overwritten():
    model, images = NormalisesItsInput(), IMAGES.clone()
    paired = pair_blocks(copy.deepcopy(model).eval(), model, images, ["one"])
    paired.teacher_outputs(images)
    assert torch.equal(images, IMAGES)


def test_a_copy_is_made_only_where_something_is_overwritten():
    def copies(model, name):
        traced = trace(model, IMAGES)
        [point] = [point for point in traced.points if name in point.aliases]
        return [node.target for part in traced.split([point]) for node in part.graph.nodes].count("clone")

    assert copies(ReluAfterwards(), "one") == copies(DroppedInPlace(), "one") == 1
    assert copies(ReluAfterwards(), "stem") == copies(Net(), "one") == 0


def test_a_flag_follows_the_network_and_the_block():
    model = FlagInAHelper()
    [block] = trace(model, IMAGES).split([])
    for switch in (model, block):
        for training in (True, False, True):
            switch.train(training)
            outputs = []
            for run in (model, block):
                torch.manual_seed(1)
                outputs.append(run(IMAGES))
            assert torch.equal(*outputs)
    assert {id(parameter) for parameter in block.parameters()} == {id(parameter) for parameter in model.parameters()}


def test_hooks_keep_a_module_whole_and_run():
    class Holder(Net):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())

        def between(self, x):
            return self.body(x)

    model, seen = Holder(), []
    model.body.register_forward_hook(lambda module, given, output: seen.append(output))
    traced = trace(model, IMAGES)
    assert "has hooks" in traced.whole["body"]
    seen.clear()
    traced.split([])[0](IMAGES)
    assert len(seen) == 1
    model.register_forward_hook(lambda module, given, output: None)
    with pytest.raises(CutError, match="Holder has hooks"):
        trace(model, IMAGES)


def test_a_trace_leaves_nothing_in_the_network():
    model = SizesBeside()
    before = dict(model.__dict__), sorted(model.state_dict())
    follow(model, (3, 8, 8))
    assert (dict(model.__dict__), sorted(model.state_dict())) == before


@dataclasses.dataclass
class Answer:
    hidden: torch.Tensor
    logits: torch.Tensor


@pytest.mark.parametrize("packed", [
    lambda y, f: (y, f), lambda y, f: [(y, f), f], lambda y, f: {"features": f, "logits": y},
    lambda y, f: {"out": y, "aux": f}, lambda y, f: Answer(f, y), lambda y, f: {"loss": None, "first": y, "rest": f},
])  # fmt: skip
def test_logits_are_found_in_what_a_network_returns(packed):
    class Packing(Net):
        def forward(self, x):
            f = self.one(self.stem(x))
            return packed(self.head(self.two(f)), f)

    torch.manual_seed(0)
    model = Packing()
    assert logits_of(model(IMAGES)).shape == (4, 5)
    paired = pair_blocks(copy.deepcopy(model).eval(), model, IMAGES, ["one"])
    assert torch.equal(paired.teacher_outputs(IMAGES)[1], logits_of(paired.teacher(IMAGES)))


def test_other_arguments_stand_at_their_defaults():
    class Optional(Net):
        def forward(self, x, mask=None, is_feat=False, *, scale=2.0):
            features = self.one(self.stem(x)) * scale
            if mask is not None:
                features = features * mask
            logits = self.head(self.two(features))
            return (features, logits) if is_feat else logits

    model = Optional()
    paired = pair_blocks(copy.deepcopy(model).eval(), model, IMAGES, ["one"])
    assert torch.equal(paired.teacher_outputs(IMAGES)[1], paired.teacher(IMAGES))


def test_an_auxiliary_head_in_training_alone():
    class Auxiliary(Net):
        def __init__(self):
            super().__init__()
            self.extra = nn.Linear(4, 5)

        def forward(self, x):
            x = self.two(self.one(self.stem(x)))
            return (self.head(x), self.extra(x.mean((2, 3)))) if self.training else self.head(x)

    paired = pair_blocks(Auxiliary().eval(), Net(), IMAGES, ["one"])
    assert torch.equal(paired.teacher_outputs(IMAGES)[1], paired.teacher(IMAGES))


def test_a_student_that_is_its_teacher_is_refused():
    model = Net()
    with pytest.raises(CutError, match="same module was given as teacher and as student"):
        pair_blocks(model, model, IMAGES, ["one"])
    twin = Net()
    twin.one = model.one
    with pytest.raises(CutError, match=r"student's parameter one\.weight and the teacher's one\.weight share"):
        pair_blocks(model, twin, IMAGES, ["stem"])


@pytest.mark.parametrize("side", ["buffer", "view"])
def test_a_student_that_shares_a_buffer_or_a_view_with_its_teacher_is_refused(side):
    """A buffer that is not in the state_dict too; a parameter that is a view of the teacher's."""
    model, twin = Net(), Net()
    if side == "buffer":
        for net in (model, twin):
            net.one.register_buffer("seen", torch.zeros(3), persistent=False)
        twin.one.seen = model.one.seen
        words = r"student's buffer one\.seen and the teacher's one\.seen share"
    else:
        twin.fc.weight = nn.Parameter(model.fc.weight.detach()[:])
        words = r"student's parameter fc\.weight and the teacher's fc\.weight share"
    with pytest.raises(CutError, match=words):
        pair_blocks(model, twin, IMAGES, ["stem"])


def test_a_teacher_that_is_not_finite_is_called_that():
    broken, large = Net(), Net()
    broken.fc.weight.data[0, 0] = torch.nan
    large.fc.weight.data.fill_(3e38)
    large.two.bias.data.fill_(100.0)
    for model, said in ((broken, "its fc.weight holds NaN"), (large, "finite, but too large")):
        with pytest.raises(CutError, match=f"teacher's outputs .* are not finite: .*{said}"):
            pair_blocks(model, Net(), IMAGES, ["one"])


def test_images_that_a_network_cannot_compute_are_named():
    with pytest.raises(ModelError, match=r"Conv2d cannot compute 2 image\(s\) of the shape \[3, 8, 8\]"):
        trace(nn.Conv2d(1, 2, 3), IMAGES)
    with pytest.raises(ModelError, match=r"gives \[288\] for 2 image\(s\), but logits"):
        trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(0)), IMAGES)


def test_why_a_module_stayed_whole_is_said():
    class Inner(Net):
        def forward(self, x):
            x = super().forward(x)
            return x * 2 if x.sum() > 1e9 else x

    model = nn.Sequential(Inner())
    with pytest.raises(
        CutError, match=r"In the teacher 0 \(Inner\) cannot be followed \(gt decides what Python does.*kd and ce need"
    ):
        pair_blocks(copy.deepcopy(model), model, IMAGES)


def test_networks_that_are_not_cut_give_their_logits():
    class Dict(Net):
        def forward(self, x):
            return {"logits": super().forward(x)}

    teacher, student = Dict().eval(), Dict()
    paired = PairedBlocks.uncut(teacher, student)
    assert torch.equal(paired.teacher_outputs(IMAGES)[0], teacher(IMAGES)["logits"])
    assert [id(p) for p in paired.student_blocks[0].parameters()] == [id(p) for p in student.parameters()]


class ReadsItsBuffers(nn.Module):
    """As timm's batch norms do, whose forward hands its own buffers to the function."""

    def __init__(self):
        super().__init__()
        self.norm, self.shift = nn.BatchNorm2d(4), nn.Parameter(torch.zeros(1))
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        norm = self.norm
        self.seen.add_(1)
        x = torch.nn.functional.batch_norm(
            x, norm.running_mean, norm.running_var, norm.weight, norm.bias, self.training, 0.1
        )
        return x + self.shift


def test_buffers_stay_the_network_s_when_it_gets_new_ones():
    """`.to()` gives a module new buffers, on another device or of another type, and blocks must go on with those."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3, 2, 1), ReadsItsBuffers(), nn.Conv2d(4, 4, 3, 2, 1), ReadsItsBuffers()
    student = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    images = torch.randn(4, 3, 16, 16)
    blocks = pair_blocks(copy.deepcopy(student).eval(), student, images).student_blocks
    student.double()
    nn.ModuleList([student, *blocks]).train()
    alone = copy.deepcopy(student)
    output = nn.Sequential(*blocks)(images.double())
    assert torch.equal(output, alone(images.double()))
    for (name, ours), theirs in zip(student.state_dict().items(), alone.state_dict().values()):
        assert torch.equal(ours, theirs), name
    nn.ModuleList(blocks).float()
    assert {buffer.dtype for name, buffer in student.named_buffers() if "running" in name} == {torch.float32}


class Counts(nn.Module):
    """Keeps a table that it makes at the first call, as ConViT's attention does, and a number."""

    def __init__(self):
        super().__init__()
        self.layer, self.table, self.calls = nn.Conv2d(4, 4, 1), None, 0

    def forward(self, x):
        if self.table is None or self.table.shape[-1] != x.shape[-1]:
            self.table = torch.arange(x.shape[-1], dtype=x.dtype)
        self.calls += 1
        return self.layer(x + self.table) if self.calls % 2 else self.layer(x - self.table)


def test_a_module_that_keeps_values_between_calls_stays_whole_and_as_it_was():
    class Keeps(Net):
        def __init__(self):
            super().__init__()
            self.two = nn.Sequential(Counts(), nn.ReLU())
            self.seen = None

        def forward(self, x):
            self.seen = self.one(self.stem(x))
            return self.head(self.two(self.seen))

    model = Keeps()
    traced = trace(model, IMAGES)
    assert traced.whole == {"two.0": "two.0 (Counts) keeps values between calls"}
    assert not isinstance(model.two[0].table, torch.fx.Proxy) and not isinstance(model.seen, torch.fx.Proxy)
    blocks = nn.Sequential(*traced.split([point for point in traced.points if "one" in point.aliases]))
    model.eval()
    for images in (IMAGES, IMAGES[:1]):
        model.two[0].calls = 0
        expected = model(images)
        model.two[0].calls = 0
        assert torch.equal(blocks.eval()(images), expected)


class MakesItsBuffer(nn.Module):
    """As ConViT's attention: the first images decide the size of a buffer."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Conv2d(4, 4, 1)
        self.register_buffer("table", torch.ones(1))

    def forward(self, x):
        if self.table.shape[0] != x.shape[-1]:
            self.table = torch.arange(x.shape[-1]).to(x)
        return self.inner(x * self.table)


def test_a_network_that_puts_other_buffers_in_place_is_left_as_it_was():
    class Makes(Net):
        def __init__(self):
            super().__init__()
            self.two = nn.Sequential(MakesItsBuffer(), nn.ReLU())

    student = Makes()
    plain = copy.deepcopy(student)
    paired = pair_blocks(Net().eval(), student, IMAGES, ["one"])
    assert torch.equal(student.two[0].table, torch.ones(1))
    blocks = nn.Sequential(*paired.student_blocks).train()
    assert torch.equal(blocks(IMAGES), plain.train()(IMAGES))


def test_cutting_leaves_the_random_state_as_it_was():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    networks = Net().eval(), Net()
    torch.manual_seed(5)
    pair_blocks(*networks, IMAGES, ["one"])
    assert torch.equal(torch.rand(3), expected)
