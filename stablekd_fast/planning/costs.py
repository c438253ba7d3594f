"""A run's costs put together, and its plan made from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from stablekd_fast.blocks import PairedBlocks
from stablekd_fast.cache.codecs import RowFormat
from stablekd_fast.cache.columns import TIERS, Columns, Kept, Plan, output_name, row_format
from stablekd_fast.cache.settings import CacheSettings, parse_bytes
from stablekd_fast.cache.speed import CodecCost, measure_codec, measure_tiers
from stablekd_fast.data import Batch, TrainSource
from stablekd_fast.engine.schedule import PlannedStage, group_name
from stablekd_fast.errors import ConfigError
from stablekd_fast.execution.process import spare_processors
from stablekd_fast.execution.timing import timed
from stablekd_fast.objectives import Objectives
from stablekd_fast.planning.networks import measure_students, measure_teacher
from stablekd_fast.planning.profiles import Profile, predicted_blocks
from stablekd_fast.planning.rows import Costs, OutputCost, StageCost, best_plan

_TIMED_BATCHES = 4


@dataclass(frozen=True)
class Planner:
    """Decides for one run what is kept of the teacher."""

    paired: PairedBlocks
    source: TrainSource
    objectives: Objectives
    stages: list[PlannedStage]
    settings: CacheSettings
    device: torch.device
    capture: str = "eager"
    """The mode in which steps will run, and in which they are timed."""

    @property
    def views(self) -> int:
        """Views that the run will show."""
        return views_shown(self.source.views, self.stages[-1].last / self.source.steps_per_epoch)

    @property
    def job(self) -> Job:
        fill = min(self.views * self.source.steps_per_epoch, self.stages[-1].last)
        rows = len(self.source.split) * self.views
        return Job(self.paired, self.objectives, self.stages, self.settings, rows, fill, self.capture)

    @cached_property
    def columns(self) -> Columns:
        return Columns(self.paired, self.source, self.settings, self.device, self.views)

    def examples(self) -> dict[int, Tensor]:
        """The wanted outputs for the first batch."""
        return self.paired.teacher_outputs(next(self.source.batches(0, 1)).pixels.to(self.device), self.job.wanted)

    def plan(self, examples: dict[int, Tensor]) -> tuple[Plan, Costs | None]:
        """The plan by the settings, and the costs if any were measured for it. Raises ConfigError if `all` is asked for
        and there is no place."""
        if not self.settings.keeps_rows or not examples:
            return Plan(), None
        places = self._places()
        if self.settings.plan == "all":
            if not places:
                raise ConfigError(
                    "cache.plan=all was given, but no place for rows; give --cache.directory or --cache.host_budget."
                )
            return Plan({k: Kept(places[0], self.job.codecs(k)[0]) for k in examples}), None
        costs = self.measure(examples)
        return best_plan(costs), costs

    def measure(self, examples: dict[int, Tensor]) -> Costs:
        """Costs on this machine; takes some seconds. Neither the student nor any random state is changed."""
        batches = self.source.batches(0, _TIMED_BATCHES + 1)
        batch = next(batches)
        made, taken = timed(lambda: sum(1 for _ in batches), self.device)
        images = {_makes_images(self.source): taken / max(made, 1)}
        columns, job = self.columns, self.job

        def stored(output: int, codec: str) -> float:
            return min(1.0, columns.stored_rows(output, examples[output], codec) / job.rows)

        return measured_costs(job, batch, examples, self.device, images, stored)

    def _places(self) -> list[str]:
        """Tiers that the settings allow, the one that `all` uses first."""
        places = ["disk"] if self.settings.directory is not None else []
        budgets = {"host": self.settings.host_budget, "device": self.settings.device_budget}
        return places + [tier for tier, budget in budgets.items() if parse_bytes(budget, tier)]


@dataclass(frozen=True)
class Job:
    """What a plan is made for. `rows`: images times views; `fill`: steps until each view was seen."""

    paired: PairedBlocks
    objectives: Objectives
    stages: list[PlannedStage]
    settings: CacheSettings
    rows: int
    fill: int
    capture: str = "eager"

    @property
    def wanted(self) -> set[int]:
        """The teacher's outputs that any stage reads."""
        count = len(self.paired.cuts)
        return set().union(*(self.objectives.teacher_outputs(s.stage.groups, count) for s in self.stages))

    def codecs(self, output: int) -> list[str]:
        """Return the codecs by which an output may be kept, the preferred one first."""
        return [self.settings.logits] if output == len(self.paired.cuts) else self.settings.codecs

    def outputs(self, blocks: list[float], examples: dict[int, Tensor], cost: Callable[[int, RowFormat], CodecCost]):
        """`blocks`: seconds per batch of each teacher block; `cost` of storing an output in a format."""
        made = []
        for k, block in enumerate(blocks):
            forms = (
                [row_format(self.paired, k, examples[k], name) for name in self.codecs(k)] if k in self.wanted else []
            )
            bridged = self.paired.bridge_after(k) is not None
            made.append(OutputCost(output_name(self.paired, k), block, {f.codec: cost(k, f) for f in forms}, bridged))
        return tuple(made)


def measured_costs(
    job: Job,
    batch: Batch,
    examples: dict[int, Tensor],
    device: torch.device,
    images: Mapping[str, float],
    stored: Callable[[int, str], float] = lambda output, codec: 0.0,
) -> Costs:
    """Costs on this machine, measured with one batch and the wanted outputs for it. `images`: seconds that making a
    batch takes, by what makes it; `stored`: the fraction of the rows of an output in a codec that are on disk already.
    """
    blocks = measure_teacher(job.paired, batch.pixels.to(device), job.capture)
    outputs = job.outputs(blocks, examples, lambda k, form: measure_codec(form, examples[k], stored(k, form.codec)))
    working_set = sum(job.rows * max((c.row_bytes for c in output.codecs.values()), default=0) for output in outputs)
    groupings = [planned.stage.groups for planned in job.stages]
    students = measure_students(job.paired, job.objectives, groupings, batch, device, job.capture)
    largest = max(examples.values(), key=lambda output: output[0].numel())
    return Costs(
        outputs,
        stage_costs(job.stages, job.objectives, len(job.paired.cuts), students, job.fill),
        measure_tiers(job.settings, largest, working_set, device),
        images,
        job.rows,
        len(batch.labels),
    )


def _makes_images(source: TrainSource) -> str:
    """Return the resource that images take: the device, but where threads decode them that take nothing from it."""
    beside = not source.split.resident and (source.device.type != "cpu" or spare_processors())
    return "loader" if beside else "device"


def predicted_costs(
    job: Job, device: Profile, examples: dict[int, Tensor], batch_size: int, image_bytes: int = 0
) -> Costs:
    """Costs on a device that is not at hand. `examples` `[N, ...]` of the outputs, for their shapes; `image_bytes`: of
    a decoded image."""
    blocks, students = predicted_blocks(device, job.paired, batch_size)
    for planned in job.stages:
        for group in planned.stage.groups:
            students[group_name(group)] = sum(students[group_name([k])] for k in group)
    budgets = {tier: float(parse_bytes(getattr(job.settings, f"{tier}_budget") or "0", tier)) for tier in TIERS}
    return Costs(
        job.outputs(blocks, examples, lambda k, form: device.codec(form, batch_size)),
        stage_costs(job.stages, job.objectives, len(job.paired.cuts), students, job.fill),
        device.tiers(budgets),
        {"loader": batch_size / device.images_per_second, "link": batch_size * image_bytes / device.link_bandwidth},
        job.rows,
        batch_size,
    )


def views_shown(views: int | None, epochs: float) -> int:
    """How many of `views` (None: endless) a run of some epochs shows."""
    shown = math.ceil(epochs)
    return shown if views is None else min(views, shown)


def stage_costs(
    stages: Iterable[PlannedStage], objectives: Objectives, cut_count: int, students: dict[str, float], fill: int
) -> tuple[StageCost, ...]:
    """`students`: seconds per batch by group name; `fill`: steps from the start of the run until each view was seen."""
    made = []
    for planned in stages:
        made.append(
            StageCost(
                sum(students[group_name(group)] for group in planned.stage.groups),
                frozenset(objectives.teacher_outputs(planned.stage.groups, cut_count)),
                planned.last - planned.first,
                max(0, min(fill, planned.last) - planned.first),
            )
        )
    return tuple(made)
