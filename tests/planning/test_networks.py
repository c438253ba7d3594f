"""Costs are timed as training will run, and leave no trace."""

import pytest
import torch
from torch import nn

from stablekd_fast.blocks import pair_blocks
from stablekd_fast.data import Batch
from stablekd_fast.errors import CaptureError
from stablekd_fast.objectives import Objectives, objective
from stablekd_fast.planning import networks
from stablekd_fast.planning.networks import measure_students, measure_teacher

CPU = torch.device("cpu")
GROUPS = [[[0], [1], [2]], [[0, 1], [2]], [[0, 1, 2]]]


def net(seed):
    torch.manual_seed(seed)
    layers = [nn.Sequential(nn.Conv2d(width, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for width in (3, 8)]
    return nn.Sequential(
        *layers, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(8, 10))
    )


@pytest.fixture
def pair():
    paired = pair_blocks(net(0).eval(), net(1), torch.randn(4, 3, 8, 8), ["0", "1"])
    nn.ModuleList([paired.teacher, *paired.teacher_blocks]).eval()
    return paired


@pytest.fixture
def modes(monkeypatch):
    """The modes in which something was run."""
    seen, make = [], networks.make_runner

    def made(mode, *given, **options):
        seen.append(mode)
        return make(mode, *given, **options)

    monkeypatch.setattr(networks, "make_runner", made)
    return seen


def batch():
    return Batch(torch.arange(8), 0, torch.randn(8, 3, 8, 8), torch.randint(0, 10, (8,)))


@pytest.mark.parametrize("capture, captured", [("eager", 0), ("compile", 0), ("emulate", 3 + 5)])
def test_what_is_captured_in_training_is_captured_when_it_is_timed(pair, modes, capture, captured):
    aims = Objectives(objective("feature", "mse"), objective("logits", "kd"), "all")
    before = {name: value.clone() for name, value in pair.student.state_dict().items()}
    random = torch.get_rng_state()
    teacher = measure_teacher(pair, torch.zeros(8, 3, 8, 8), capture)
    assert len(teacher) == 3 and min(teacher) > 0
    given = batch()
    torch.set_rng_state(random)
    students = measure_students(pair, aims, GROUPS, given, CPU, capture)
    assert students.keys() == {"1", "2", "3", "1+2", "1+2+3"} and min(students.values()) > 0
    assert modes == ["emulate"] * captured
    assert all(torch.equal(value, before[name]) for name, value in pair.student.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert not any(parameter.grad is not None for parameter in pair.student.parameters())


def test_what_cannot_be_captured_is_timed_eagerly(pair, monkeypatch):
    def fails(*_, **__):
        raise CaptureError("aten.item cannot be captured")

    monkeypatch.setattr(networks, "make_runner", fails)
    assert min(measure_teacher(pair, torch.zeros(8, 3, 8, 8), "emulate")) > 0
