"""Steps of a run's stages as `stablekd bench budget` looks at them: counted, timed on the host alone, or profiled."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from stablekd_fast.bench.runs.device_steps import FedAhead
from stablekd_fast.bench.standin import Shipment, counting, standin
from stablekd_fast.bench.standin.fakes import on_fake_cuda
from stablekd_fast.bench.standin.kernel_table import Work
from stablekd_fast.blocks import PairedBlocks
from stablekd_fast.cache.columns import Column, row_format
from stablekd_fast.cache.memory_rows import MemoryRows
from stablekd_fast.config import DistillConfig, objectives_of
from stablekd_fast.data import Batch
from stablekd_fast.engine.schedule import Optimizer, group_name
from stablekd_fast.execution.capture import make_runner
from stablekd_fast.teacher.cached import CachedTeacher
from stablekd_fast.teacher.live import LiveTeacher, Relay, Teacher

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
LIVE = "live teacher"
FED_BY = {LIVE: None, "rows on the device": "device", "rows in main memory": "host"}
"""What feeds a step, and the memory in which its rows lie."""
_HOST_BATCH, _HOST_STEPS = 2, 200
_PROFILED_STEPS = 10


@dataclass(frozen=True)
class Way:
    """One way to run steps: the groups of a stage, and what feeds them."""

    groups: list[list[int]]
    fed_by: str

    @property
    def stage(self) -> str:
        return "|".join(group_name(group) for group in self.groups)


@dataclass(frozen=True)
class Steps:
    """Makes the steps of one pair, as a run on a GPU makes them, on any device."""

    paired: PairedBlocks
    size: int
    batch_size: int
    optimizer: Optimizer
    image_dtype: torch.dtype

    def of(self, way: Way, device: torch.device, batch_size: int | None = None) -> FedAhead:
        """Make captured steps over two batches, so that rows of one are read while the other trains."""
        batches = [self._batch(number, batch_size or self.batch_size, device) for number in range(2)]
        arm = FedAhead(
            self.paired, self._teacher(way, batches, device), batches, "cudagraph", groups=way.groups,
            objectives=objectives_of(DistillConfig()), optimizer=self.optimizer,
        )  # fmt: skip
        arm.train(), arm.train()  # the live teacher is captured once it was asked twice
        return arm

    def _batch(self, number: int, count: int, device: torch.device) -> Batch:
        images = torch.randn(count, 3, self.size, self.size, device=device).to(self.image_dtype)
        labels = torch.zeros(count, dtype=torch.int64, device=device)
        ids = torch.arange(number * count, (number + 1) * count)
        return Batch(ids, 0, images.contiguous(memory_format=torch.channels_last), labels)

    def _teacher(self, way: Way, batches: list[Batch], device: torch.device) -> Teacher:
        live, tier = LiveTeacher(self.paired, "cudagraph", fall_back=False), FED_BY[way.fed_by]
        if tier is None:
            return Relay(self.paired, live)
        count, place = sum(len(batch.labels) for batch in batches), CPU if tier == "host" else device
        columns = {}
        for output, example in self.paired.teacher_outputs(batches[0].pixels).items():
            form = row_format(self.paired, output, example, "fp32")
            rows = MemoryRows(form.parts, count, place)
            rows._slots, rows.used = torch.arange(count), count  # all are there; nobody looks at what they hold
            columns[output] = Column(f"{output}", form, rows)
        teacher = CachedTeacher(self.paired, columns, count, device, live)
        if tier == "host" and device.type == "cpu":
            teacher._lies_apart = lambda store: True  # as on a GPU, whose rows are gathered ahead
        return teacher


@dataclass(frozen=True)
class Counted:
    """What a step gives the device to do, and what it ships between host and device: bytes and copies."""

    work: list[Work]
    shipments: Counter[Shipment]
    copies: Counter[Shipment]
    outside: int
    """Operations that the host gives the device one by one, outside of captured graphs."""
    columns: int
    """Columns whose rows a step reads."""
    beside: list[Work] = field(default_factory=list)
    """The part of the work that makes the next batch ready, on another stream than that which trains."""


def counted(steps: Steps, ways: list[Way]) -> list[Counted]:
    """Count a step of each way on fake CUDA tensors; the networks' own are lost."""
    found = []
    with counting() as budget:
        on_fake_cuda(steps.paired, FakeTensorMode(), str(GPU))
        for way in ways:
            arm = steps.of(way, GPU)
            work = budget.of(arm.train)
            columns = len(arm.stage.wanted) if FED_BY[way.fed_by] else 0
            shipped, copies, beside = budget.shipments.copy(), budget.copies.copy(), budget.beside.copy()
            found.append(Counted(work, shipped, copies, len(budget.work), columns, beside))
            arm.teacher.close()
    return found


def host_seconds(steps: Steps, ways: list[Way]) -> list[float]:
    """Measure what a replayed step takes of the host's time in Python: median of steps whose graphs, copies and gathers
    do nothing."""
    found = []
    for way in ways:
        with standin(), _graphs_on_cpu():
            arm = steps.of(way, CPU, _HOST_BATCH)
            with _copies_nothing():
                found.append(statistics.median(_seconds(arm) for _ in range(_HOST_STEPS)))
            arm.teacher.close()
    return found


def _seconds(arm: FedAhead) -> float:
    start = time.perf_counter()
    arm.load()
    arm.runner.run()
    return time.perf_counter() - start


@contextmanager
def _graphs_on_cpu() -> Iterator[None]:
    """A context in which tensors of the CPU are captured, into graphs of a stand-in."""

    def make(mode: str, bodies, state, device: torch.device, **options):
        return make_runner(mode, bodies, state, GPU, **options)

    with (
        mock.patch("stablekd_fast.engine.stage.make_runner", make),
        mock.patch("stablekd_fast.teacher.live.make_runner", make),
    ):
        yield


@contextmanager
def _copies_nothing() -> Iterator[None]:
    """A context in which copying and gathering costs a call."""

    def chosen(tensor: Tensor, axis: int, index: Tensor) -> Tensor:
        return tensor[: len(index)]

    with (
        mock.patch.object(torch.Tensor, "copy_", lambda tensor, *_, **__: tensor),
        mock.patch.object(torch.Tensor, "index_select", chosen),
        mock.patch.object(torch, "index_select", lambda *_, **__: None),
    ):
        yield


@dataclass(frozen=True)
class Profiled:
    """What a GPU did for a step: how many kernels and copies, the device's seconds in them, and those of the step."""

    kernels: float
    busy_seconds: float
    step_seconds: float


def profiled(steps: Steps, ways: list[Way], device: torch.device) -> list[Profiled]:
    """Profile replayed steps on a GPU, on which the pair lies."""
    found = []
    for way in ways:
        arm = steps.of(way, device)
        found.append(_profile(arm, device))
        arm.runner.close(), arm.teacher.close()
    return found


def _profile(arm: FedAhead, device: torch.device) -> Profiled:
    wait = partial(torch.cuda.synchronize, device)
    wait()
    start = time.perf_counter()
    for _ in range(_PROFILED_STEPS):
        arm.train()
    wait()
    seconds = (time.perf_counter() - start) / _PROFILED_STEPS
    with torch.profiler.profile() as profiler:
        for _ in range(_PROFILED_STEPS):
            arm.train()
        wait()
    return of_device(profiler.events(), seconds)


def of_device(events: list, step_seconds: float, steps: int = _PROFILED_STEPS) -> Profiled:
    """Return what a profiler's events say of the device, for a step. What people have named is no kernel."""
    own = [event for event in events if event.device_type != torch.autograd.DeviceType.CPU]
    own = [event for event in own if not getattr(event, "is_user_annotation", False) and "#" not in event.name]
    busy = sum(event.time_range.elapsed_us() for event in own) / 1e6
    return Profiled(len(own) / steps, busy / steps, step_seconds)
