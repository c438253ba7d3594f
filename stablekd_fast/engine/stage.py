"""A stage in training: its groups' steps, the ranks that divide them, and losses on their way to the host."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stablekd_fast.blocks import PairedBlocks
from stablekd_fast.data import Batch, StreamSource, TrainSource
from stablekd_fast.distributed import Layout, Ranks
from stablekd_fast.engine.schedule import Optimizer, PlannedStage
from stablekd_fast.engine.step import GroupStep, Rates, StageInputs, StepOptions, load_batch
from stablekd_fast.execution.capture import HostCopy, Runner, make_runner
from stablekd_fast.objectives import Objectives
from stablekd_fast.teacher.live import Teacher

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class StageSteps:
    """The steps of a stage's groups, over the inputs that they share."""

    steps: list[GroupStep]
    inputs: StageInputs
    wanted: set[int]
    """The teacher's outputs that the steps read."""

    def load(self, teacher: Teacher, batch: Batch) -> None:
        """Fill the inputs with a batch and the teacher's outputs for it."""
        load_batch(self.inputs, teacher, self.wanted, batch)

    def run(self) -> None:
        """Train every group on the batch in the inputs."""
        for step in self.steps:
            step.run()

    def state(self) -> list[Tensor]:
        """Return all tensors that the steps change and that outlive them."""
        return [tensor for step in self.steps for tensor in step.state()]

    def runner(self, capture: str, *, fall_back: bool = False) -> Runner:
        """Make what runs the steps in a mode of `make_runner`. The inputs must have been loaded once."""
        bodies = [step.run for step in self.steps]
        return make_runner(capture, bodies, self.state(), self.inputs.device, fall_back=fall_back)


def stage_steps(
    paired: PairedBlocks,
    groups: list[list[int]],
    objectives: Objectives,
    optimizer: Optimizer,
    *,
    rates: Rates,
    inputs: StageInputs | None = None,
    **options: Unpack[StepOptions],
) -> StageSteps:
    """Make one step per group. Without `inputs` they get new ones, on the device of the rates.

    Whether the student is in training mode is left to the caller.
    """
    inputs = StageInputs(rates.table.device) if inputs is None else inputs
    steps = [GroupStep(paired, group, objectives, optimizer, inputs, rates=rates, **options) for group in groups]
    return StageSteps(steps, inputs, objectives.teacher_outputs(groups, len(paired.cuts)))


class DividedSteps:
    """A stage's steps, divided over the ranks by a layout. `steps` are those of all groups; `own` are trained here."""

    def __init__(self, ranks: Ranks, layout: Layout, steps: list[GroupStep]) -> None:
        self.ranks, self.layout, self.steps = ranks, layout, steps
        self.own = [steps[group] for group in layout.groups_of(ranks.rank)]
        self.idle = 0.0
        """Seconds of training in which this rank waited for others."""
        self._bytes_before = (ranks.gradient_bytes, ranks.other_bytes)

    @contextmanager
    def training(self) -> Iterator[None]:
        """What is waited for within counts as idle."""
        before = self.ranks.waited
        yield
        self.idle += self.ranks.waited - before

    def stores(self, cut_count: int) -> set[int]:
        """The teacher's outputs that this rank stores: one that two places read is stored by the first of them."""
        place = self.layout.block_of(self.ranks.rank)
        before = [step.group for step, at in zip(self.steps, self.layout.places) if at < place]
        objectives = self.own[0].objectives
        read = objectives.teacher_outputs([step.group for step in self.own], cut_count)
        return read - set().union(*(objectives.teacher_outputs([group], cut_count) for group in before))

    def broadcast_state(self) -> None:
        """After it every rank holds every group as its owner does, and the first one's random state."""
        if self.ranks.size == 1:
            return
        random = torch.get_rng_state()
        for number, step in enumerate(self.steps):
            self.ranks.broadcast(step.state(), self.layout.owner(number))
        self.ranks.broadcast([random], 0)
        torch.set_rng_state(random)

    def broadcast_losses(self) -> float:
        """After it every rank knows the losses of all groups. Returns the seconds that it took, waiting included."""
        if self.ranks.size == 1:
            return 0.0
        start = time.perf_counter()
        with self.training():
            for number, step in enumerate(self.steps):
                self.ranks.broadcast([step.losses, step.first_bad], self.layout.owner(number))
        self.ranks.say_where()
        return time.perf_counter() - start

    def report(self, steps: int, seconds: float) -> list[dict]:
        """For each rank what it did in `steps` steps and so many seconds, as predicted and as measured."""
        layout, ranks, before = self.layout, self.ranks, self._bytes_before
        return ranks.all_gather(
            {
                "rank": ranks.rank,
                "groups": [step.name for step in self.own],
                "predicted_ms": 1e3 * layout.seconds[layout.block_of(ranks.rank)] if layout.seconds else None,
                "measured_ms": 1e3 * (seconds - self.idle) / steps,
                "idle_share": self.idle / seconds if seconds else 0.0,
                "gradient_bytes": (ranks.gradient_bytes - before[0]) / steps,
                "other_bytes": (ranks.other_bytes - before[1]) / steps,
            }
        )


@dataclass(frozen=True)
class Losses:
    """The losses of the last steps of a stage: for each step a value by the name of its group."""

    by_step: list[dict[str, float]]
    first_bad: dict[str, int]
    """For each group whose loss was not finite the first step of the stage at which that was so."""
    event: dict
    """What is logged with them."""

    def means(self) -> dict[str, float]:
        """The mean of each group's losses."""
        return {name: sum(row[name] for row in self.by_step) / len(self.by_step) for name in self.by_step[0]}


@dataclass(frozen=True)
class _Reading:
    """Losses on their way to the host."""

    copy: HostCopy
    position: int
    """The place in the stage behind the last of the losses."""
    count: int
    event: dict


class LossReader:
    """Brings losses to the host without a wait: it starts a copy, and hands the values over once they have arrived."""

    def __init__(self, steps: list[GroupStep]) -> None:
        self.steps = steps
        self.unread = 0
        """Steps whose losses are on the device only."""
        self._reading: _Reading | None = None

    @property
    def arrived(self) -> bool:
        """Whether a copy was started whose values can be taken without a wait."""
        return self._reading is not None and self._reading.copy.arrived

    def start(self, position: int, event: dict) -> None:
        """Begin to copy the unread losses, which end before `position` of the stage; `event` comes back with them."""
        copy = HostCopy([tensor for step in self.steps for tensor in (step.losses, step.first_bad)])
        self._reading, self.unread = _Reading(copy, position, self.unread, event), 0

    def take(self) -> Losses | None:
        """Wait for the copy under way, if there is one, and return what it brought."""
        reading, self._reading = self._reading, None
        if reading is None:
            return None
        values, names = reading.copy.values(), [step.name for step in self.steps]
        places = range(reading.position - reading.count, reading.position)
        columns = [losses[[place % len(losses) for place in places]].tolist() for losses in values[::2]]
        bad = {name: int(first) for name, first in zip(names, values[1::2]) if first >= 0}
        return Losses([dict(zip(names, row)) for row in zip(*columns)], bad, reading.event)


@dataclass
class StageRun:
    """A stage in training."""

    index: int
    planned: PlannedStage
    divided: DividedSteps
    wanted: set[int]
    """The teacher's outputs that this process's steps read."""
    source: TrainSource | StreamSource
    """Makes this process's part of each batch."""
    teacher: Teacher
    losses: LossReader
    entered_at: int
    entered_seconds: float
    runner: Runner | None = None
    """Made with the first batch, when the inputs are laid out."""
    current: str = "the teacher"
    """What runs now, for a report of memory that ran out."""

    @property
    def steps(self) -> list[GroupStep]:
        """The steps of all groups."""
        return self.divided.steps

    @property
    def own(self) -> list[GroupStep]:
        """The steps that run in this process."""
        return self.divided.own

    def needs_images(self, sample_ids: Tensor, view: int) -> bool:
        """Whether a group that begins with the images, or the teacher, needs those of these samples in this view."""
        return any(step.group[0] == 0 for step in self.own) or self.teacher.needs_images(self.wanted, sample_ids, view)
