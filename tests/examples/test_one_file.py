"""The example of the method in one file computes the engine's losses, on real images, through merges."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from stablekd_fast import pair_blocks
from stablekd_fast.data import Batch
from stablekd_fast.engine.inputs import StageInputs, load_batch
from stablekd_fast.engine.schedule import Optimizer, PlannedStage, Stage
from stablekd_fast.engine.step import GroupStep, Rates
from stablekd_fast.objectives import Objectives, objective
from stablekd_fast.teacher.live import Relay

EXAMPLE = Path(__file__).parents[2] / "examples" / "stablekd_in_one_file.py"
STAGES = [([[0], [1], [2], [3]], 20, 0.02), ([[0, 1], [2, 3]], 4, 0.01), ([[0, 1, 2, 3]], 6, 0.002)]
"""These are groups, steps and peak learning rate. In fewer than 20 steps the rate does not fall to its floor."""


@pytest.fixture
def example():
    """Each test gets a module of its own, which it may break."""
    spec = importlib.util.spec_from_file_location("stablekd_in_one_file", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=[torch.float64], ids=str)
def dtype(request, one_thread):
    """The default type is also that of the engine's table of learning rates, and of the losses that it keeps."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


@pytest.fixture
def twins(example, dtype):
    """Two pairs start alike, of a trained teacher and a student of half its width; the batches last for all stages."""
    torch.manual_seed(0)
    images, labels = example.digits()
    images, steps = images.to(dtype), sum(steps for _, steps, _ in STAGES)
    teacher, student = example.network(width=8), example.network(width=4)
    batches = example.make_batches(images, labels, steps)
    example.train(teacher, lambda x, y: [nn.functional.cross_entropy(teacher(x), y)], batches, peak=0.01)
    networks = [copy.deepcopy((teacher.eval(), student)) for _ in range(2)]
    return *(pair_blocks(*both, images[:64]) for both in networks), batches


def engine_losses(paired, batches, stages):
    """The engine trains with its own defaults, and every step's loss of each group is returned."""
    aims = Objectives(objective("feature", "mse"), objective("logits", "kd"), align="all")
    done, losses = 0, []
    for groups, count, peak in stages:
        planned = PlannedStage(Stage(groups, steps=count, optimizer=Optimizer(lr=peak)), done, done + count)
        inputs, rates = StageInputs(), Rates.of_stage(planned, None, torch.device("cpu"))
        settings, wanted = planned.stage.optimizer, aims.teacher_outputs(groups, len(paired.cuts))
        steps = [GroupStep(paired, group, aims, settings, inputs, rates=rates, history=count) for group in groups]
        paired.student.train()
        for images, labels in batches[done : done + count]:
            load_batch(inputs, Relay(paired), wanted, Batch(torch.arange(len(labels)), 0, images, labels))
            for step in steps:
                step.run()
        losses += torch.stack([step.losses for step in steps], dim=1).tolist()
        done += count
    return losses


def example_losses(example, paired, batches, stages):
    done, losses = 0, []
    for groups, count, peak in stages:
        losses += example.train_groups(paired, groups, batches[done : done + count], peak)
        done += count
    return losses


def largest_difference(ours, engine):
    assert [len(step) for step in ours] == [len(step) for step in engine]
    return max(abs(a - b) / abs(b) for one, other in zip(ours, engine) for a, b in zip(one, other))


def test_float64_losses_are_the_engines_through_two_merges(example, twins):
    mine, engines, batches = twins
    assert all(bridge is not None for bridge in mine.bridges) and not engines.fuses_norms
    losses = example_losses(example, mine, batches, STAGES)
    assert largest_difference(losses, engine_losses(engines, batches, STAGES)) < 1e-9
    assert sum(losses[19]) < sum(losses[0]) / 2, "blocks that learn nothing would agree in anything"
    for name, value in mine.student.named_parameters():
        torch.testing.assert_close(value, engines.student.get_parameter(name), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32], indirect=True, ids=str)
@pytest.mark.parametrize("groups", [[[0], [1], [2], [3]], [[0, 1], [2, 3]], [[0, 1, 2, 3]]], ids=str)
def test_float32_losses_of_a_first_step_are_the_engines(example, twins, groups):
    mine, engines, batches = twins
    stages = [(groups, 1, 0.02)]
    losses = example_losses(example, mine, batches, stages), engine_losses(engines, batches, stages)
    assert largest_difference(*losses) < 1e-5


@pytest.mark.parametrize("constant", ["TEMPERATURE", "KL_WEIGHT", "LABEL_WEIGHT", "WARMUP", "WEIGHT_DECAY"])
def test_a_constant_of_another_value_would_be_noticed(example, twins, constant, monkeypatch):
    """A hundredth more of it is seen within four steps."""
    mine, engines, batches = twins
    monkeypatch.setattr(example, constant, 1.01 * getattr(example, constant))
    stages = [([[0], [1], [2], [3]], 4, 0.02)]
    losses = example_losses(example, mine, batches, stages), engine_losses(engines, batches, stages)
    assert largest_difference(*losses) > 1e-7
