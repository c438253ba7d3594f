"""A small pair in training, on any device and in any mode: what `test_capture.py` runs on a GPU.

`STABLEKD_REHEARSE=1 pytest tests/gpu/test_capture.py` rehearses those tests on the CPU with emulated graphs, as far as
they do not need a GPU's own counters, so that the tests themselves can be checked where there is no GPU.
"""

import contextlib
import os

import pytest
import torch
from torch import nn

from stablekd_fast.blocks import pair_blocks
from stablekd_fast.data import Batch
from stablekd_fast.engine.inputs import load_batch
from stablekd_fast.engine.schedule import Optimizer, PlannedStage, Stage, merge_neighbours
from stablekd_fast.engine.stage import stage_steps
from stablekd_fast.engine.step import GroupStep, Rates
from stablekd_fast.execution import process
from stablekd_fast.execution.capture import make_runner
from stablekd_fast.execution.precision import Precision
from stablekd_fast.objectives import Objectives, objective
from stablekd_fast.teacher.live import LiveTeacher, Relay

# Read at cuBLAS's first call in the process: without it cuBLAS may add in another order on another stream.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

REHEARSING = os.environ.get("STABLEKD_REHEARSE") == "1" and not torch.cuda.is_available()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """In a rehearsal the tests of capture are not skipped for want of a GPU."""
    for item in items:
        if REHEARSING and item.path.name == "test_capture.py" and item.path.parent.name == "gpu":
            item.own_markers[:] = [mark for mark in item.own_markers if mark.name != "skip"]


@pytest.fixture
def real_gpu():
    if REHEARSING:
        pytest.skip("needs a real GPU, not a rehearsal")


class Small:
    """One device and one way of capturing: pairs, batches, stages and runners on it."""

    def __init__(self, device: torch.device, captured: str) -> None:
        self.device, self.captured = device, captured
        self.aims = Objectives(objective("feature", "mse"), objective("logits", "kd"), "all")

    def batch(self, seed: int) -> Batch:
        made = torch.Generator().manual_seed(seed)
        images, labels = torch.randn(8, 3, 8, 8, generator=made), torch.randint(0, 10, (8,), generator=made)
        return Batch(torch.arange(8), 0, images, labels)

    def net(self, depth: int, seed: int, dropout: float = 0.0) -> nn.Sequential:
        torch.manual_seed(seed)
        parts = []
        for inside, width, stride in ((3, 8, 1), (8, 16, 2), (16, 16, 2)):
            layers = [nn.Conv2d(inside, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)]
            layers += [nn.ReLU(), nn.Dropout(dropout)]
            for _ in range(depth - 1):
                layers += [nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            parts.append(nn.Sequential(*layers))
        whole = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
        return whole.to(self.device).to(memory_format=torch.channels_last)

    def pair(self, precision: str = "fp32", dropout: float = 0.0):
        images = self.batch(0).images.to(self.device)
        teacher = self.net(2, 1)
        for norm in (module for module in teacher.modules() if isinstance(module, nn.BatchNorm2d)):
            norm.momentum = 1.0
        with torch.no_grad():
            teacher(images)  # activations, and with them losses, of ordinary size
        paired = pair_blocks(teacher.eval(), self.net(1, 2, dropout), images, ["0", "1", "2"])
        paired.precision = Precision(precision)
        return paired

    def steps(
        self, paired, groups, optimizer=None, *, count=4, ema=None, average=None, compiled=False
    ) -> list[GroupStep]:
        """Steps of one stage over the same inputs, with the first batch loaded."""
        optimizer = optimizer or Optimizer()
        planned = PlannedStage(Stage(groups, steps=count, optimizer=optimizer), 0, count)
        rates = Rates.of_stage(planned, ema, self.device)
        nn.ModuleList(paired.student_blocks).train()
        options = {"history": count, "ema": average, "compiled": compiled}
        made = stage_steps(paired, groups, self.aims, optimizer, rates=rates, **options).steps
        self.load(made, 0)
        return made

    def load(self, steps: list[GroupStep], seed: int, teacher=None) -> None:
        wanted = self.aims.teacher_outputs([step.group for step in steps], 3)
        load_batch(steps[0].inputs, teacher or Relay(steps[0].paired), wanted, self.batch(seed))

    @contextlib.contextmanager
    def runner(self, steps: list[GroupStep], mode: str | None = None):
        state = [tensor for step in steps for tensor in step.state()]
        made = make_runner(mode or self.captured, [step.run for step in steps], state, self.device, fall_back=False)
        with contextlib.closing(made):
            yield made

    def train(self, mode: str, optimizer, precision="fp32", *, dropout=0.0, ema=0.9, count=14) -> list[torch.Tensor]:
        """Three stages of `count` steps, merging in between: all that a step changes, at the end of each."""
        paired, seen = self.pair(precision, dropout), []
        average = {name: p.detach().clone() for name, p in paired.student.named_parameters()}
        torch.manual_seed(5)
        for groups in merge_neighbours(4):
            steps = self.steps(paired, groups, optimizer, count=count, ema=ema, average=average)
            live = LiveTeacher(paired, mode, fall_back=False)
            with self.runner(steps, mode) as runner, contextlib.closing(live):
                for seed in range(count):
                    self.load(steps, seed % 7, Relay(paired, live))
                    runner.run()
                seen += [tensor.detach().clone() for step in steps for tensor in step.state()]
        return seen


@pytest.fixture
def small():
    return Small(torch.device("cpu"), "emulate") if REHEARSING else Small(torch.device("cuda"), "cudagraph")


@pytest.fixture
def deterministic():
    """Both ways must take the same kernels, and those must add in one order."""
    with process.deterministic(torch.device("cpu" if REHEARSING else "cuda")):
        yield
