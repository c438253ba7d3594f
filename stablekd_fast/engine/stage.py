"""A stage in training: its groups' steps, the ranks that divide them, and losses on their way to the host."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from stablekd_fast.blocks import PairedBlocks
from stablekd_fast.data import Batch, StreamSource, TrainSource
from stablekd_fast.distributed import Layout, Ranks
from stablekd_fast.engine.inputs import StageInputs, load_batch
from stablekd_fast.engine.schedule import Optimizer, PlannedStage
from stablekd_fast.engine.step import GroupStep, Rates, StepOptions
from stablekd_fast.engine.stops import Stops
from stablekd_fast.execution.capture import Body, Runner, make_runner
from stablekd_fast.execution.moments import HostCopy, Moment
from stablekd_fast.execution.process import random_states, set_random_states
from stablekd_fast.execution.side import Side
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
        first, *then = bodies_of(self.steps)
        return make_runner(capture, first, self.state(), self.inputs.device, fall_back=fall_back, then=then)


def bodies_of(steps: list[GroupStep], told: Callable[[str], None] = lambda name: None) -> list[list[Body]]:
    """Return what the steps do, in the phases that `make_runner` takes. `told` is called with a step's name before the
    step does something.

    Steps that average over ranks do so together: one exchange between two phases serves all of them. Branches of a
    graph run at the same time, and a communicator must not be used twice at a time. Steps that exchange something in
    forward and backward too come one after the other.
    """

    def body(step: GroupStep, part: Callable[[GroupStep], None]) -> None:
        told(step.name)
        part(step)

    def of_each(part: Callable[[GroupStep], None]) -> list[Body]:
        return [partial(body, step, part) for step in steps]

    def average(tensors: Callable[[GroupStep], list[Tensor]]) -> None:
        steps[0].average_over_ranks([tensor for step in steps for tensor in tensors(step)])

    if steps[0].averaging is None:
        return [of_each(GroupStep.run)]
    computing = of_each(GroupStep.compute)
    one_by_one = any(step.exchanges for step in steps)
    return [
        [partial(average, GroupStep.of_whole_batch)],
        *([[one] for one in computing] if one_by_one else [computing]),
        [partial(average, GroupStep.of_own_part)],
        of_each(GroupStep.finish),
    ]


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
        self._bytes_before = (ranks.gradient_bytes, ranks.other_bytes)
        self._idle = 0.0
        ranks.clock.collect(wait=True)
        ranks.exchanges_captured = False

    @contextmanager
    def training(self) -> Iterator[None]:
        """Exchanges within count as idle time of this rank."""
        before, self.ranks.waiting_in = self.ranks.waiting_in, "training"
        try:
            yield
        finally:
            self.ranks.waiting_in = before

    def stores(self, cut_count: int) -> set[int]:
        """The teacher's outputs that this rank stores: one that two places read is stored by the first of them."""
        place = self.layout.block_of(self.ranks.rank)
        before = [step.group for step, at in zip(self.steps, self.layout.places) if at < place]
        objectives = self.own[0].objectives
        read = objectives.teacher_outputs([step.group for step in self.own], cut_count)
        return read - set().union(*(objectives.teacher_outputs([group], cut_count) for group in before))

    def broadcast_state(self) -> None:
        """After it every rank holds every group as its owner does, and the first one's random states."""
        if self.ranks.size == 1:
            return
        for number, step in enumerate(self.steps):
            self.ranks.broadcast(step.state(), self.layout.owner(number))
        self.broadcast_random_states()

    def broadcast_random_states(self) -> None:
        """After it every rank draws what the first one draws, as all do when a run goes on from a checkpoint."""
        states = random_states(self.own[0].device)
        self.ranks.broadcast(list(states.values()), 0)
        set_random_states(self.own[0].device, states)

    def broadcast_losses(self) -> None:
        """After it every rank knows the losses of all groups."""
        if self.ranks.size == 1:
            return
        with self.training():
            for number, step in enumerate(self.steps):
                self.ranks.broadcast([step.losses], self.layout.owner(number))
        self.ranks.say_where()
        self._take_idle_time()

    def _take_idle_time(self, *, wait: bool = False) -> None:
        """Add up what exchanges of this stage's steps have taken by now: their timings are kept until then."""
        self._idle += self.ranks.clock.collect(wait=wait).get("training", 0.0)

    def report(self, steps: int, seconds: float) -> list[dict]:
        """For each rank what it did in `steps` steps and so many seconds of its device, as predicted and as measured.

        Where exchanges are captured, how long the rank idled in them is not known, and its steps' time includes it.
        """
        layout, ranks, before = self.layout, self.ranks, self._bytes_before
        self._take_idle_time(wait=True)
        idle = self._idle
        return ranks.all_gather(
            {
                "rank": ranks.rank,
                "groups": [step.name for step in self.own],
                "predicted_ms": 1e3 * layout.seconds[layout.block_of(ranks.rank)] if layout.seconds else None,
                "measured_ms": 1e3 * (seconds - idle) / steps,
                "idle_share": None if ranks.exchanges_captured else idle / seconds if seconds else 0.0,
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
    timings: int
    """How many of the loop's timings had ended when they were made."""

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
    timings: int


def first_not_finite(losses: Sequence[float]) -> int | None:
    """The place of the first loss that is not finite, None if all are."""
    return next((place for place, loss in enumerate(losses) if not math.isfinite(loss)), None)


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

    def start(self, position: int, event: dict, timings: int) -> None:
        """Begin to copy the unread losses, which end before `position` of the stage; `event` and `timings` come back
        with them."""
        copy = HostCopy([step.losses for step in self.steps])
        self._reading, self.unread = _Reading(copy, position, self.unread, event, timings), 0

    def take(self, wait: Callable[[Moment], None]) -> Losses | None:
        """Have `wait` wait for the copy under way, if there is one, and return what it brought."""
        reading, self._reading = self._reading, None
        if reading is None:
            return None
        wait(reading.copy.end)
        values, names = reading.copy.values(), [step.name for step in self.steps]
        places = range(reading.position - reading.count, reading.position)
        columns = [losses[len(losses) - reading.count :].tolist() for losses in values]
        found = {name: first_not_finite(losses) for name, losses in zip(names, columns)}
        bad = {name: places[first] for name, first in found.items() if first is not None}
        return Losses([dict(zip(names, row)) for row in zip(*columns)], bad, reading.event, reading.timings)


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
    side: Side
    """Makes the next batch ready."""
    losses: LossReader
    stops: Stops
    entered_at: int
    entered_seconds: float
    runner: Runner | None = None
    """Made with the first batch, when the inputs are laid out."""
    current: str = "the teacher"
    """What runs now, for a report of memory that ran out."""
    stopped_by: int | None = None
    """The number of the signal after whose step the run ends."""

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
        return any(step.needs_images for step in self.own) or self.teacher.needs_images(self.wanted, sample_ids, view)
