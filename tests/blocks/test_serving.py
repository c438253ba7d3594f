"""The form in which the teacher serves: the bits of the plain blocks, or, folded, as exact as they are."""

import copy
import warnings

import pytest
import torch
from torch import nn

from stablekd_fast import models
from stablekd_fast.blocks import PairedBlocks, pair_blocks, serve, serving
from stablekd_fast.blocks.serving import ConvAct
from stablekd_fast.errors import ConfigError
from stablekd_fast.execution.precision import Precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NETWORKS = [("resnet20", 16), ("vgg8", 32), ("mobilenet_v2", 32), ("torchvision/resnet18", 64), ("wrn_16_2", 16)]


def trained(name, size, seed=0):
    """A network whose norms do something: statistics and weights away from 0 and 1."""
    torch.manual_seed(seed)
    network = models.build(name, 10, size).to(memory_format=torch.channels_last)
    for norm in (module for module in network.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.running_mean.normal_(0, 0.3), norm.running_var.uniform_(0.5, 2)
        norm.weight.data.uniform_(0.5, 1.5), norm.bias.data.normal_(0, 0.3)
    return network.eval()


def pair_of(name, size, precision="fp32"):
    images = torch.randn(6, 3, size, size).contiguous(memory_format=torch.channels_last)
    paired = pair_blocks(trained(name, size), trained(name, size, 1), images)
    nn.ModuleList([paired.teacher, *paired.teacher_blocks]).eval()
    paired.precision = Precision(precision)
    return paired, images


def kinds(paired):
    return [type(module) for block in paired.serving_blocks for module in block.modules()]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name, size", NETWORKS)
def test_without_folding_the_bits_are_those_of_the_plain_blocks(name, size, precision):
    paired, images = pair_of(name, size, precision)
    expected = paired.teacher_outputs(images)
    plain = serve(paired, images, "off")
    found = plain.teacher_outputs(images)
    assert not plain.folded and all(torch.equal(found[k], expected[k]) for k in expected)
    weights = [m.weight for block in plain.serving_blocks for m in block.modules() if type(m) is nn.Conv2d]
    assert {weight.dtype for weight in weights} == {paired.precision.dtype}, "cast once, not at each use"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name, size", NETWORKS)
def test_folded_every_output_is_at_most_twice_as_far_from_float64(name, size, precision):
    paired, images = pair_of(name, size, precision)
    folded = serve(paired, images, "on")
    ours, theirs = folded.teacher_outputs(images), paired.teacher_outputs(images)
    exact = copy.deepcopy(paired.teacher).double()
    blocks = [copy.deepcopy(block).double() for block in paired.teacher_blocks]
    x = images.double()
    for k, block in enumerate(blocks):
        with torch.no_grad():
            x = block(x)
        mine, plain = ((outputs[k].double() - x).square().mean().sqrt() for outputs in (ours, theirs))
        assert mine <= max(2 * plain, torch.finfo(ours[k].dtype).eps * x.abs().mean())
    torch.testing.assert_close(x, exact(images.double()))
    assert folded.folded and ConvAct in kinds(folded)
    assert name == "wrn_16_2" or nn.BatchNorm2d not in kinds(folded), "no norm is left behind a convolution"


def test_what_is_folded_shares_nothing_that_would_change_the_teacher():
    paired, images = pair_of("resnet20", 16)
    before = {name: value.clone() for name, value in paired.teacher.state_dict().items()}
    folded = serve(paired, images, "on")
    for block in folded.serving_blocks:
        for parameter in block.parameters():
            assert not parameter.requires_grad or any(parameter is own for own in paired.teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in paired.teacher.state_dict().items())
    assert folded.teacher_blocks is paired.teacher_blocks


def test_a_network_that_was_not_cut_is_followed():
    teacher, student = trained("resnet20", 16), trained("resnet20", 16, 1)
    images = torch.randn(4, 3, 16, 16)
    paired = PairedBlocks.uncut(teacher, student)
    folded = serve(paired, images, "on")
    assert ConvAct in kinds(folded)
    torch.testing.assert_close(folded.teacher_outputs(images)[0], teacher(images), rtol=1e-4, atol=1e-4)


def test_blocks_that_were_not_traced_serve_as_they_are():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.norm(self.conv(x)) if x.sum() > -1e9 else x

    def network():
        return [Own(), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))]

    images = torch.randn(4, 3, 16, 16)
    lists = network(), network()
    holders = [nn.Sequential(*blocks) for blocks in lists]
    paired = pair_blocks(*holders, images, teacher_blocks=lists[0], student_blocks=lists[1])
    nn.ModuleList(paired.teacher_blocks).eval()
    folded = serve(paired, images, "on")
    assert torch.equal(folded.teacher_outputs(images)[0], paired.teacher_outputs(images)[0])


def test_norms_that_cannot_be_folded_stay():
    """A hook expects the norm, another user the convolution's result, a subclass its own way of computing."""

    class Counted(nn.BatchNorm2d):
        pass

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(width, 4, 3, padding=1) for width in (3, 4, 4))
            self.na, self.nb, self.nc = nn.BatchNorm2d(4), Counted(4), nn.BatchNorm2d(4)
            self.head = nn.Linear(4, 10)

        def forward(self, x):
            first = self.a(x)
            x = torch.relu(self.na(first)) + first
            x = torch.relu(self.nb(self.b(x)))
            x = torch.relu(self.nc(self.c(x)))
            return self.head(x.mean((2, 3)))

    teacher, student = Net().eval(), Net().eval()
    images = torch.randn(4, 3, 8, 8)
    paired = pair_blocks(teacher, student, images, ["nb"])
    teacher.nc.register_forward_hook(lambda *_: None)
    nn.ModuleList([teacher, *paired.teacher_blocks]).eval()
    folded = serve(paired, images, "on")
    norms = [
        module for block in folded.serving_blocks for module in block.modules() if isinstance(module, nn.BatchNorm2d)
    ]
    assert {id(norm) for norm in norms} == {id(teacher.na), id(teacher.nb), id(teacher.nc)}
    expected = paired.teacher_outputs(images)
    for k, output in folded.teacher_outputs(images).items():
        torch.testing.assert_close(output, expected[k], rtol=1e-4, atol=1e-4)


def test_a_folded_form_that_is_not_exact_enough_is_told_and_not_used(monkeypatch):
    paired, images = pair_of("resnet20", 16)
    right = serving._folded
    monkeypatch.setattr(serving, "_folded", lambda *given: tuple(1.001 * value for value in right(*given)))
    monkeypatch.setattr(serving, "pick_folding", lambda name, device: name != "off")
    with pytest.warns(RuntimeWarning, match=r"serves without folded norms: folded, its error at .* is"):
        served = serve(paired, images, "auto")
    assert not served.folded
    with pytest.raises(ConfigError, match=r"fold_teacher=on was given, but folded, its error at"):
        serve(paired, images, "on")


def test_a_folded_form_that_cannot_be_computed_is_told_and_not_used(monkeypatch):
    paired, images = pair_of("resnet20", 16)

    def fails(*_):
        raise RuntimeError("no engine for this convolution")

    monkeypatch.setattr(ConvAct, "forward", fails)
    monkeypatch.setattr(serving, "pick_folding", lambda name, device: True)
    with pytest.warns(RuntimeWarning, match="it cannot be computed: no engine for this convolution"):
        assert not serve(paired, images, "auto").folded


def test_where_there_is_nothing_to_fold_nothing_is_tried(monkeypatch):
    images = torch.randn(2, 3, 224, 224)
    teacher, student = (models.build("timm/vit_tiny_patch16_224", 10, 224).eval() for _ in range(2))
    paired = pair_blocks(teacher, student, images, ["blocks.5"])
    monkeypatch.setattr(serving, "_inexact", lambda *_: "it was tried")
    served = serve(paired, images, "on")
    assert not served.folded and ConvAct not in kinds(served)


def test_folding_is_picked_by_device():
    assert serving.pick_folding("auto", CUDA) and not serving.pick_folding("auto", CPU)
    assert serving.pick_folding("on", CPU) and not serving.pick_folding("off", CUDA)
    with pytest.raises(ConfigError, match="choose one of auto, on, off"):
        serving.pick_folding("yes", CPU)


def test_nothing_is_said_where_all_is_well():
    paired, images = pair_of("resnet20", 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert serve(paired, images, "on").folded and not serve(paired, images, "auto").folded
