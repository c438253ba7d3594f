"""Weights that are cast once a step: the numbers of autocast, and its gradients."""

import pytest
import torch
from torch import nn

from stablekd_fast import models
from stablekd_fast.blocks import fuse_norms, pair_blocks
from stablekd_fast.data import Batch
from stablekd_fast.engine import step as step_module
from stablekd_fast.engine.inputs import StageInputs, load_batch
from stablekd_fast.engine.schedule import Optimizer
from stablekd_fast.engine.step import GroupStep, Rates
from stablekd_fast.engine.weights import CastWeights
from stablekd_fast.execution.precision import Precision
from stablekd_fast.objectives import Objectives, objective
from stablekd_fast.teacher.live import Relay

NETWORKS = [("resnet20", 16), ("mobilenet_v2", 32), ("torchvision/convnext_tiny", 64)]


def blocks_of(name, size, fused):
    torch.manual_seed(0)
    networks = [models.build(name, 10, size).to(memory_format=torch.channels_last) for _ in range(2)]
    images = torch.randn(4, 3, size, size).contiguous(memory_format=torch.channels_last)
    blocks = pair_blocks(*networks, images).student_blocks
    for block in blocks:
        block.train()
    return networks[1], [fuse_norms(block) for block in blocks] if fused else blocks, images


def gradients(network, outputs):
    torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name, size", NETWORKS)
def test_outputs_and_gradients_have_the_bits_of_autocast(name, size, fused):
    network, blocks, images = blocks_of(name, size, fused)
    state = {key: value.clone() for key, value in network.state_dict().items()}
    results = []
    for weights in (None, CastWeights(blocks, torch.bfloat16)):
        network.load_state_dict(state)
        network.zero_grad()
        torch.manual_seed(1)  # of stochastic depth
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            outputs, x = [], images
            if weights is not None:
                weights.refresh()
            for number, block in enumerate(blocks):
                outputs.append(block(x) if weights is None else weights.call(number, x))
                x = outputs[-1].detach()
        gradients(network, outputs)
        if weights is not None:
            weights.hand_back()
        named = {key: parameter.grad.clone() for key, parameter in network.named_parameters()}
        results.append((outputs, named))
    (plain, expected), (cast, found) = results
    assert all(torch.equal(a, b) for a, b in zip(plain, cast))
    assert expected.keys() == found.keys()
    for key in expected:
        assert found[key].dtype == torch.float32 and torch.equal(expected[key], found[key]), key


def test_every_convolution_and_linear_weight_of_a_resnet_is_cast_together():
    network, blocks, _ = blocks_of("resnet20", 16, True)
    weights = CastWeights(blocks, torch.bfloat16)
    expected = {id(p) for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear)) for p in m.parameters()}
    assert {id(parameter) for parameter in weights.parameters} == expected
    assert all(cast.stride() == own.stride() for cast, own in zip(weights.casts, weights.parameters))


def test_a_weight_that_is_used_in_another_way_is_left_to_autocast():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 10)

        def forward(self, x):
            y = self.conv(x)
            return self.head(y.mean((2, 3))) + self.head.weight.square().sum()

    network, other = Tied(), Tied()
    paired = pair_blocks(other.eval(), network, torch.randn(2, 3, 8, 8), ["conv"])
    weights = CastWeights(paired.student_blocks, torch.bfloat16)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    assert {names[id(parameter)] for parameter in weights.parameters} == {"conv.weight", "conv.bias", "head.bias"}


def test_weights_that_do_not_train_have_no_gradient():
    network, blocks, _ = blocks_of("resnet20", 16, False)
    network.conv1.requires_grad_(False)
    weights = CastWeights(blocks, torch.bfloat16)
    assert not any(parameter is network.conv1.weight for parameter in weights.parameters)


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_steps_have_the_bits_that_they_have_with_autocast_alone(monkeypatch, micro_batches):
    trained = []
    for cast in (True, False):
        if not cast:
            monkeypatch.setattr(step_module, "CastWeights", lambda *_: None)
        torch.manual_seed(0)
        networks = [models.build("resnet20", 10, 16).to(memory_format=torch.channels_last) for _ in range(2)]
        batch = Batch(torch.arange(8), 0, torch.randn(8, 3, 16, 16), torch.randint(0, 10, (8,)))
        paired, inputs = pair_blocks(*networks, batch.pixels), StageInputs()
        nn.ModuleList([paired.teacher, *paired.teacher_blocks]).eval()
        nn.ModuleList(paired.student_blocks).train()
        paired.precision = Precision("bf16")
        aims = Objectives(objective("feature", "mse"), objective("logits", "kd"), "all")
        load_batch(inputs, Relay(paired), aims.teacher_outputs([[0, 1, 2, 3]], 3), batch)
        step = GroupStep(
            paired, [0, 1, 2, 3], aims, Optimizer("sgd"), inputs, rates=Rates.constant(0.1), micro_batches=micro_batches
        )
        assert (step.weights is not None) == cast
        for _ in range(3):
            step.run()
        trained.append([value.clone() for value in step.parameters.values()] + [step.losses.clone()])
    assert all(torch.equal(a, b) for a, b in zip(*trained))
