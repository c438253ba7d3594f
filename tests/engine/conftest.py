import pytest
import torch
from torch import nn

from stablekd_fast.config import DistillConfig
from stablekd_fast.data import Batch, open_dataset
from stablekd_fast.engine.checkpoint import load_optimizer_tensors, optimizer_tensors
from stablekd_fast.engine.schedule import Optimizer, PlannedStage
from stablekd_fast.engine.stage import stage_steps
from stablekd_fast.engine.step import Rates
from stablekd_fast.run.distiller import Distiller
from stablekd_fast.teacher.live import LiveTeacher, Relay

CPU = torch.device("cpu")


def small_net(depth: int, seed: int, first: int = 8) -> nn.Sequential:
    """Three stages on 8x8 images, `first` channels wide and then twice as wide, and a classifier for ten classes; quick
    to train."""
    torch.manual_seed(seed)
    stages = []
    for inside, width, stride in ((3, first, 1), (first, 2 * first, 2), (2 * first, 2 * first, 2)):
        layers = [nn.Conv2d(inside, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        for _ in range(depth - 1):
            layers += [nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        stages.append(nn.Sequential(*layers))
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * first, 10))


@pytest.fixture(name="small_net")
def small_net_fixture():
    return small_net


def random_batch(seed: int, count: int = 8, size: int = 8, classes: int = 10) -> Batch:
    """Images and labels by seed."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, size, size, generator=generator)
    return Batch(torch.arange(count), 0, images, torch.randint(0, classes, (count,), generator=generator))


@pytest.fixture(name="random_batch")
def random_batch_fixture():
    return random_batch


def settled(teacher: nn.Module, size: int = 8) -> nn.Module:
    """In eval mode with batch-norm statistics of random images, as a trained teacher's: with those of a new network its
    activations fade from layer to layer, and aligning to them diverges."""
    with torch.no_grad(), torch.random.fork_rng():
        for seed in range(30):
            teacher.train()(random_batch(seed, 32, size).images)
    return teacher.eval()


@pytest.fixture(name="settled")
def settled_fixture():
    return settled


def train_stages(mode, paired, aims, stages, batches, ema=0.9, loss_scale=None, seed=5):
    """Train through stages that have `steps`, as the engine does, taking the batches in turn.

    All that the steps keep (weights, buffers, optimizer states, losses, loss scales, averages), copied at the end of
    each stage. `loss_scale`: where float16 begins; the engine's own beginning skips most of a few steps.
    """
    average = None if ema is None else {name: p.detach().clone() for name, p in paired.student.named_parameters()}
    seen, moments, first = [], {}, 0
    torch.manual_seed(seed)
    for stage in stages:
        nn.ModuleList([paired.student, *paired.student_blocks]).train()
        planned = PlannedStage(stage, first, first + stage.steps)
        live, rates = LiveTeacher(paired, mode, fall_back=False), Rates.of_stage(planned, ema, CPU)
        made = stage_steps(paired, stage.groups, aims, stage.optimizer, rates=rates, history=stage.steps, ema=average)
        steps = made.steps
        if stage.optimizer_state == "carry":
            for step in steps:
                load_optimizer_tensors("optimizer", step.parameters, step.optimizer, moments)
        for step in steps:
            if loss_scale is not None and step.loss_scale is not None:
                step.loss_scale.scale.fill_(loss_scale)
        runner = None
        for turn in range(planned.first, planned.last):
            made.load(Relay(paired, live), batches[turn % len(batches)])
            if runner is None:
                runner = made.runner(mode)
            runner.run()
        seen += [tensor.detach().clone() for tensor in made.state()]
        for step in steps:
            moments |= optimizer_tensors("optimizer", step.parameters, step.optimizer)
        runner.close()
        live.close()
        first = planned.last
    return seen


@pytest.fixture(name="train_stages")
def train_stages_fixture(one_thread):
    return train_stages


def same_bits(one, other) -> bool:
    """Whether two lists of tensors agree. A NaN agrees with nothing: a run that diverged shows nothing."""
    return len(one) == len(other) and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one, other))


@pytest.fixture(name="same_bits")
def same_bits_fixture():
    return same_bits


@pytest.fixture(scope="session")
def digits():
    return open_dataset("digits")


@pytest.fixture
def make(tmp_path, digits):
    """A small run on the digits: `make(method="kd", out="a", ...)` gives a Distiller."""

    def build(out: str = "run", **settings) -> Distiller:
        defaults = {
            "recipe": "progressive",
            "epochs": 3.0,
            "subset": 160,
            "validation": 40,
            "batch_size": 32,
            "log_every": 2,
            "bn_images": 64,
            "cuts": ["0", "1", "2"],
            "optimizer": Optimizer(lr=0.01),
            "device": "cpu",
            "precision": "fp32",
        }
        config = DistillConfig(out=str(tmp_path / out), **{**defaults, **settings})
        return Distiller(config, teacher=small_net(2, 1), student=small_net(1, 2), dataset=digits)

    return build
