"""The reused teacher classifier: the loss and the projector against their formulas, whole runs, and what is refused."""

import copy
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from stablekd_fast import black_box, evaluate_file, models
from stablekd_fast.blocks import pair_reused
from stablekd_fast.blocks.check import in_float64
from stablekd_fast.blocks.reused import projector_of
from stablekd_fast.config import DistillConfig, objectives_of
from stablekd_fast.engine.checkpoint import AVERAGE, below, load_tensors, save_tensors
from stablekd_fast.engine.schedule import Optimizer
from stablekd_fast.errors import ConfigError, CutError, ModelError
from stablekd_fast.models.weights import card_of
from stablekd_fast.planning.pair import PairPlan
from stablekd_fast.run.distiller import Distiller

SETTINGS = {
    "data": "digits", "method": "simkd", "teacher": "resnet20", "student": "resnet20_half", "epochs": 1.0, "subset": 64,
    "batch_size": 16, "validation": 16, "bn_images": 32, "precision": "fp32", "device": "cpu", "log_every": 1,
}  # fmt: skip


def teacher_network(seed=0):
    torch.manual_seed(seed)
    return models.build("resnet20", 10, 8).eval()


class NormedHead(nn.Module):
    """A network whose classifier has a batch norm and a dropout, behind maps of `size` places a side."""

    def __init__(self, width=12, size=4):
        super().__init__()
        self.conv, self.bn, self.pool = nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.AdaptiveAvgPool2d(size)
        self.head = nn.Sequential(nn.BatchNorm1d(width), nn.Dropout(0.5), nn.Linear(width, 10))

    def forward(self, x):
        return self.head(self.pool(self.bn(self.conv(x)).relu()).mean((2, 3)))


@pytest.fixture
def make(tmp_path):
    """Make a run in a folder of this name."""

    def build(name="run", teacher=None, **changed):
        config = DistillConfig(**{**SETTINGS, "out": str(tmp_path / name), **changed})
        return Distiller(config, teacher=teacher_network() if teacher is None else teacher)

    return build


def finished(distiller):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the teacher knows nothing
        result = distiller.run(progress=False)
    return result, load_tensors(Path(distiller.config.out) / "student.safetensors")[0]


def test_the_loss_is_the_mean_squared_error_of_the_features_alone():
    aims = objectives_of(DistillConfig(method="simkd"))
    student, teacher = (torch.randn(4, 6, 3, 3, dtype=torch.float64) for _ in range(2))
    loss, gradient = aims.feature(student, teacher, 1)
    difference = student.numpy() - teacher.numpy()
    assert loss.item() == pytest.approx(np.square(difference).mean(), rel=1e-12)
    np.testing.assert_allclose(gradient, 2 * difference / difference.size, rtol=1e-12)
    logits = torch.randn(4, 10, dtype=torch.float64)
    at_head = aims.logits(logits, torch.randn(4, 10, dtype=torch.float64), torch.arange(4))
    assert at_head[0] == 0 and not at_head[1].any()
    assert (aims.aligned_cuts([0, 1], 1), aims.auxiliary) == ([0], None)


def normed(x, module):
    mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, correction=0)
    shape = (1, -1, 1, 1)
    return (x - mean) / (variance + 1e-5).sqrt() * module.weight.view(shape) + module.bias.view(shape)


def by_hand(projector, x):
    """Three convolutions of 1, 3 and 1 places a side, each with the statistics of the batch and a ReLU."""
    convolutions = [module for module in projector if isinstance(module, nn.Conv2d)]
    norms = [module for module in projector if isinstance(module, nn.BatchNorm2d)]
    for convolution, norm, padding in zip(convolutions, norms, (0, 1, 0), strict=True):
        x = normed(F.conv2d(x, convolution.weight, padding=padding), norm).clamp_min(0)
    return x


@pytest.mark.parametrize(("size", "wanted", "pooled"), [(4, 4, 4), (4, 2, 2), (2, 4, 2), (5, 3, 3)])
def test_the_projector_is_a_bottleneck_of_half_the_teachers_width(size, wanted, pooled):
    projector = projector_of((6, size, size), (10, wanted, wanted)).double()
    for module in projector:
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight), nn.init.normal_(module.bias)
    shapes = [tuple(module.weight.shape) for module in projector if isinstance(module, nn.Conv2d)]
    assert shapes == [(5, 6, 1, 1), (5, 5, 3, 3), (10, 5, 1, 1)]
    x = torch.randn(8, 6, size, size, dtype=torch.float64, requires_grad=True)
    expected = by_hand(projector, F.adaptive_avg_pool2d(x, pooled))
    found = projector(x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    parameters = [x, *projector.parameters()]
    seed = torch.randn_like(found)
    gradients = [torch.autograd.grad(output, parameters, seed) for output in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-8)


def test_the_blocks_give_the_gradients_of_the_written_out_student():
    """In float64: features before the pooling, the projector by hand, the mean squared error."""
    teacher, student = teacher_network(), models.build("resnet20_half", 10, 8)
    images = torch.randn(8, 3, 8, 8)
    paired = pair_reused(teacher, student, images)
    whole, maps = paired.student, []
    with in_float64(nn.ModuleList([teacher, student, whole, *paired.student_blocks, *paired.teacher_blocks])):
        images = images.double()
        teacher.avgpool.register_forward_pre_hook(lambda module, given: maps.append(given[0]))
        student.avgpool.register_forward_pre_hook(lambda module, given: maps.append(given[0]))
        teacher(images), student.train()(images)
        expected = (by_hand(whole.projector, maps[1]) - maps[0].detach()).square().mean()
        parameters = [parameter for parameter in whole.parameters() if parameter.requires_grad]
        theirs = torch.autograd.grad(expected, parameters)
        target = paired.teacher_outputs(images, [0])[0]
        output = paired.student_blocks[0].train()(images)
        loss, gradient = objectives_of(DistillConfig(method="simkd")).feature(output.detach(), target, 1)
        ours = torch.autograd.grad(output, parameters, gradient)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)
    names = {name.partition(".")[0] for name, parameter in whole.named_parameters() if parameter.requires_grad}
    assert names == {"encoder", "projector"}


@pytest.mark.parametrize("ema", [None, 0.9])
def test_a_run_trains_all_but_the_teachers_classifier_and_exports_one_network(make, ema):
    distiller = make(ema=ema, optimizer=Optimizer("sgd", lr=0.05, weight_decay=0.1))
    begun = copy.deepcopy(distiller.paired.student.state_dict())
    result, student = finished(distiller)
    head = teacher_network().linear
    assert torch.equal(student["classifier.network.linear.weight"], head.weight)
    assert torch.equal(student["classifier.network.linear.bias"], head.bias)
    same = {name for name, value in student.items() if torch.equal(value, begun[name])}
    assert same == {"classifier.network.linear.weight", "classifier.network.linear.bias"}
    out = Path(distiller.config.out)
    assert card_of(out / "student.safetensors")["student"] == "simkd/resnet20_half+resnet20"
    assert f'"accuracy": {result.accuracy}' in (out / "results.json").read_text()
    for file in ("student.safetensors", "checkpoint.safetensors"):
        found = evaluate_file(out / file, device="cpu")
        assert (found.accuracy, found.top5) == (result.accuracy, result.top5), file
    if ema:
        average = below(load_tensors(out / "checkpoint.safetensors")[0], AVERAGE)
        assert torch.equal(average["classifier.network.linear.weight"], head.weight)


@pytest.mark.parametrize("size", [1, 2])
def test_norms_and_dropout_of_the_classifier_stay_in_evaluation_mode(make, size):
    """The student's map is 2 x 2; the teacher's is 4 x 4, and its pooling is a part of the classifier."""
    torch.manual_seed(3)
    teacher = NormedHead(size=size)
    for _ in range(3):
        teacher(torch.randn(64, 3, 8, 8) * 3)
    distiller = make(teacher=teacher.eval())
    cut = distiller.paired.cuts[0]
    assert (cut.teacher_shape, cut.student_shape) == ((12, 4, 4), (12, 2, 2))
    expected = {f"classifier.network.head.{name}": value.clone() for name, value in teacher.head.state_dict().items()}
    _, student = finished(distiller)
    found = {name: value for name, value in student.items() if name.startswith("classifier.")}
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    block = distiller.paired.student_blocks[-1].train()
    assert not any(module.training for module in block.modules())
    features = torch.randn(4, 12, 2, 2)
    assert torch.equal(block(features), block(features))  # nothing is dropped
    torch.testing.assert_close(block(features), teacher.head(features.mean((2, 3))))


@pytest.mark.parametrize(
    ("teacher", "student", "size", "map_of_teacher", "meets"),
    [
        ("resnet20", "ShuffleV1", 16, (64, 4, 4), (64, 2, 2)),  # the teacher's is averaged, as a target
        ("ShuffleV1", "resnet20", 16, (960, 2, 2), (960, 2, 2)),  # the student's is averaged, before the projector
        ("resnet20", "MobileNetV2", 16, (64, 4, 4), (64, 1, 1)),  # a last map of one place
    ],
)
def test_maps_meet_on_the_coarser_grid(teacher, student, size, map_of_teacher, meets):
    networks, images = [models.build(name, 10, size) for name in (teacher, student)], torch.randn(4, 3, size, size)
    maps, network = [], networks[0].eval()
    pool = next(module for module in network.modules() if isinstance(module, nn.AdaptiveAvgPool2d))
    pool.register_forward_pre_hook(lambda module, given: maps.append(given[0]))
    network(images)
    pool._forward_pre_hooks.clear()
    paired = pair_reused(*networks, images)
    assert (paired.cuts[0].teacher_shape, paired.cuts[0].student_shape) == (map_of_teacher, meets)
    target = paired.teacher_outputs(images, [0])[0]
    torch.testing.assert_close(target, F.adaptive_avg_pool2d(maps[0], meets[1:]))
    assert paired.student_blocks[0](images).shape[1:] == meets


def test_an_export_is_a_model_by_name_for_other_runs(make):
    """As a teacher, and with its weights; the student's own weights start the encoder."""
    torch.manual_seed(5)
    plain = models.build("resnet20_half", 10, 8)
    first = make("first")
    weights = Path(first.config.out).parent / "plain.safetensors"
    save_tensors(weights, plain.state_dict(), {})
    first.config.student_weights = str(weights)
    encoder = first.paired.student.encoder.state_dict()
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in encoder.items())
    finished(first)
    file = str(Path(first.config.out) / "student.safetensors")
    name = card_of(file)["student"]
    torch.manual_seed(0)
    again = Distiller(
        DistillConfig(**{**SETTINGS, "teacher": name, "teacher_weights": file, "out": f"{first.config.out}-2"})
    )
    _, student = finished(again)
    assert torch.equal(student["classifier.network.classifier.network.linear.weight"], teacher_network().linear.weight)
    assert card_of(Path(again.config.out) / "student.safetensors")["student"] == f"simkd/resnet20_half+{name}"
    evaluate_file(Path(again.config.out) / "student.safetensors", device="cpu")


class Convolved(nn.Module):
    """A classifier that is a convolution of one place, whose map of logits is pooled."""

    def __init__(self):
        super().__init__()
        self.conv, self.classifier = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 10, 1)

    def forward(self, x):
        return self.classifier(self.conv(x).relu()).mean((2, 3))


def test_a_classifier_may_be_a_convolution():
    """The features are what it reads, not its logits."""
    paired = pair_reused(Convolved().eval(), models.build("resnet20_half", 10, 8), torch.randn(4, 3, 8, 8))
    assert paired.cuts[0].teacher_shape == (6, 4, 4)
    assert [name for name, _ in paired.student.classifier.named_parameters()] == [
        "network.classifier.weight", "network.classifier.bias"
    ]  # fmt: skip


class Tokens(nn.Module):
    """What a transformer carries, tokens `[N, T, C]`, and a classifier of their mean."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear, self.head = nn.Conv2d(3, 6, 2, 2), nn.Linear(6, 6), nn.Linear(6, 10)

    def forward(self, x):
        return self.head(self.linear(self.conv(x).flatten(2).transpose(1, 2)).mean(1))


class Flat(nn.Module):
    """A classifier that takes maps of 4 x 4 alone."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 3, 2, 1), nn.Linear(96, 10)

    def forward(self, x):
        return self.head(self.conv(x).flatten(1))


class Unsure(nn.Module):
    def forward(self, x):
        return torch.full((len(x), 10), 0.1)


@pytest.mark.parametrize(
    ("teacher", "changed", "error", "sentence"),
    [
        (Tokens, {}, CutError, r"the teacher carries \[16, 6\] per image there. Choose a convolutional teacher"),
        (Flat, {}, CutError, r"does not take .* student's grid is \[2, 2\], the teacher's \[4, 4\]"),
        (lambda: black_box(Unsure(), classes=10), {}, ConfigError, "needs the teacher's outputs at cuts, .* black box"),
        (None, {"teacher_image_size": 16}, CutError, "images have 16 pixels a side, the student's 8"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(make, teacher, changed, error, sentence):
    distiller = make(teacher=teacher and teacher(), **changed)
    with warnings.catch_warnings(), pytest.raises(error, match=sentence):
        warnings.simplefilter("ignore")
        finished(distiller)
    assert not Path(distiller.config.out, "checkpoint.safetensors").exists()


def test_what_is_missing_or_made_by_hand_is_refused(make, tmp_path):
    with pytest.raises(ConfigError, match="The method simkd needs a trained teacher"):
        Distiller(DistillConfig(**SETTINGS, out=str(tmp_path / "none"))).run(progress=False)
    by_hand = pair_reused(teacher_network(), models.build("resnet20_half", 10, 8), torch.randn(4, 3, 8, 8))
    with pytest.raises(ConfigError, match="paired was given, but the method simkd makes the student"):
        Distiller(DistillConfig(**SETTINGS, out=str(tmp_path / "hand")), paired=by_hand).run(progress=False)
    with pytest.raises(ConfigError, match="method=simkd was given, but its student is put together in a run"):
        PairPlan("resnet20", "resnet20_half", method="simkd")


@pytest.mark.parametrize("name", ["simkd/", "simkd/resnet20", "simkd/+resnet20", "simkd/resnet20+"])
def test_names_without_both_networks_are_refused(name):
    with pytest.raises(ModelError, match=r"There is no model .*; simkd/STUDENT\+TEACHER is a student"):
        models.build(name, 10, 8)
