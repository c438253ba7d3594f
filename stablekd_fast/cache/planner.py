"""A run's costs put together, and its plan made from them."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from stablekd_fast.blocks import PairedBlocks
from stablekd_fast.cache.columns import Columns, output_name, row_format
from stablekd_fast.cache.measure import measure_codec, measure_students, measure_teacher, measure_tiers, stage_costs
from stablekd_fast.cache.plan import Costs, Kept, OutputCost, Plan, best_plan
from stablekd_fast.cache.settings import CacheSettings, parse_bytes
from stablekd_fast.data import TrainSource
from stablekd_fast.errors import ConfigError
from stablekd_fast.schedule import PlannedStage
from stablekd_fast.step import Objectives

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

    @property
    def views(self) -> int:
        """Views that the run will show."""
        return views_shown(self.source, self.stages[-1].last)

    @property
    def wanted(self) -> set[int]:
        """The teacher's outputs that any stage reads."""
        count = len(self.paired.cuts)
        return set().union(*(self.objectives.teacher_outputs(s.stage.groups, count) for s in self.stages))

    def columns(self) -> Columns:
        return Columns(self.paired, self.source, self.settings, self.device, self.views)

    def examples(self) -> dict[int, Tensor]:
        """The wanted outputs for the first batch."""
        return self.paired.teacher_outputs(next(self.source.batches(0, 1)).images.to(self.device), self.wanted)

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
            logits = len(self.paired.cuts)
            kept = {k: Kept(places[0], self.settings.logits if k == logits else self.settings.codecs[0]) for k in examples}
            return Plan(kept), None
        costs = self.measure(examples)
        return best_plan(costs), costs

    def measure(self, examples: dict[int, Tensor]) -> Costs:
        """Costs on this machine; takes some seconds. Neither the student nor any random state is changed."""
        batches = self.source.batches(0, _TIMED_BATCHES + 1)
        batch = next(batches)
        start = time.perf_counter()
        made = sum(1 for _ in islice(batches, _TIMED_BATCHES))
        images = (time.perf_counter() - start) / max(made, 1)
        rows = len(self.source.split) * self.views
        columns, count = self.columns(), len(self.paired.cuts)
        blocks = measure_teacher(self.paired, batch.images.to(self.device))
        outputs, working_set = [], 0
        for k, block in enumerate(blocks):
            names = [self.settings.logits] if k == count else self.settings.codecs
            codecs = {}
            for codec in names if k in examples else ():
                form = row_format(self.paired, k, examples[k], codec)
                stored = min(1.0, columns.stored_rows(k, examples[k], codec) / rows)
                codecs[codec] = measure_codec(form, examples[k], stored)
            working_set += rows * max((codec.row_bytes for codec in codecs.values()), default=0)
            bridged = k < count and self.paired.bridges[k] is not None
            outputs.append(OutputCost(output_name(self.paired, k), block, codecs, bridged))
        largest = max(examples.values(), key=lambda output: output[0].numel())
        groupings = [planned.stage.groups for planned in self.stages]
        students = measure_students(self.paired, self.objectives, groupings, batch, self.device)
        fill = math.inf if self.source.views is None else self.source.views * self.source.steps_per_epoch
        return Costs(
            tuple(outputs),
            stage_costs(self.stages, self.objectives, count, students, min(fill, self.stages[-1].last)),
            measure_tiers(self.settings, largest, working_set, self.device),
            {"device" if self.device.type == "cpu" else "loader": images},
            rows,
            self.source.batch_size,
        )

    def _places(self) -> list[str]:
        """Tiers that the settings allow, the one that `all` uses first."""
        places = ["disk"] if self.settings.directory is not None else []
        budgets = {"host": self.settings.host_budget, "device": self.settings.device_budget}
        return places + [tier for tier, budget in budgets.items() if parse_bytes(budget, tier)]


def views_shown(source: TrainSource, steps: int) -> int:
    """How many views a run of `steps` steps shows."""
    epochs = math.ceil(steps / source.steps_per_epoch)
    return epochs if source.views is None else min(source.views, epochs)
