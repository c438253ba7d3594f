"""Trains a pair twice for a short time, end to end and decomposed, and looks at its blocks on the way."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from rich.progress import track
from torch import nn

from stablekd_fast.blocks.pair import Cut
from stablekd_fast.config import DistillConfig
from stablekd_fast.data import Dataset
from stablekd_fast.diagnose.probe import Probe, probe_inputs
from stablekd_fast.diagnose.settings import ARMS, END_TO_END, NOT_USED, Probing
from stablekd_fast.engine.schedule import Optimizer, PlannedStage, Stage
from stablekd_fast.engine.stage import StageSteps, first_not_finite, stage_steps
from stablekd_fast.engine.step import GroupStep, Rates
from stablekd_fast.errors import ConfigError, TrainingError
from stablekd_fast.execution.memory import watched
from stablekd_fast.models.weights import restore_state
from stablekd_fast.run.materials import Given, Materials, gather
from stablekd_fast.teacher.live import Relay


@dataclass(frozen=True)
class Measurements:
    """What was measured of a pair, in rows by arm, seed and step."""

    cuts: list[Cut]
    precision: str
    """The name of the precision in which the students trained."""
    blocks: list[dict]
    """A row per block."""
    between: list[dict]
    """A row per cut between blocks that train together."""


def measure(
    config: DistillConfig, probing: Probing, *, progress: bool = True, dataset: Dataset | None = None
) -> Measurements:
    """Train both arms for every seed from `config.seed` on, and look at them.

    Raises ConfigError, DataError, ModelError or CutError if the parts do not fit, TrainingError if a loss is not
    finite.
    """
    blocks: list[dict] = []
    between: list[dict] = []
    parts: Materials | None = None
    used = DistillConfig(**{f.name: getattr(config, f.name) for f in fields(config) if f.name not in NOT_USED})
    for seed in range(config.seed, config.seed + probing.seeds):
        parts = gather(replace(used, seed=seed), Given(dataset=dataset))
        dataset = parts.images.dataset
        twin = Twin(parts, probing)
        for arm in ARMS:
            own, cuts = twin.train(arm, progress)
            blocks += [{"arm": arm, "seed": seed, **row} for row in own]
            between += [{"arm": arm, "seed": seed, **row} for row in cuts]
    assert parts is not None  # Probing wants two seeds at least
    return Measurements(parts.paired.cuts, parts.paired.precision.name, blocks, between)


class Twin:
    """Trains both arms of one seed from the same first weights, on the same batches, with the same optimizer."""

    def __init__(self, parts: Materials, probing: Probing) -> None:
        if len(parts.paired) < 2:
            raise ConfigError("The pair has one block; entanglement is between blocks. Give --cuts or --blocks.")
        self.parts, self.probing, self.objectives = parts, probing, parts.objectives
        self.first = {name: value.clone() for name, value in parts.paired.student.state_dict().items()}
        # The probe batches come from the epochs after the training, one from each: independent, in views of their own.
        per_epoch = parts.source.steps_per_epoch
        epoch = -(-probing.steps // per_epoch)
        starts = [(epoch + i) * per_epoch for i in range(probing.probe_batches)]
        batches = (next(parts.source.batches(start, start + 1)) for start in starts)
        self.inputs = probe_inputs(parts.paired, self.objectives, batches, parts.device)

    def groups(self, arm: str) -> list[list[int]]:
        """Return the groups of blocks that train together: all of them, or each by itself."""
        blocks = list(range(len(self.parts.paired)))
        return [blocks] if arm == END_TO_END else [[block] for block in blocks]

    def train(self, arm: str, progress: bool = False, look: bool = True) -> tuple[list[dict], list[dict]]:
        """Train one arm; return rows of blocks and of cuts, none without a `look`."""
        parts, probing = self.parts, self.probing
        stage = Stage(self.groups(arm), steps=probing.steps, optimizer=parts.config.optimizer or Optimizer())
        steps = self._begin(stage)
        probe = Probe(parts.paired, stage.groups, self.objectives, self.inputs)
        teacher = Relay(parts.paired)
        batches = enumerate(parts.source.batches(0, probing.steps))
        shown = f"seed {parts.config.seed}, {arm}"
        blocks, cuts = [], []
        for number, batch in track(batches, shown, probing.steps, disable=not progress, transient=True):
            before = probe.weights() if look and number in probing.at else None
            with watched(lambda: shown, parts.config.batch_size):
                steps.load(teacher, batch)
                steps.run()
                if before is not None:
                    seen = probe.look(probing.at.index(number), before)
                    for rows, new in zip((blocks, cuts), seen):
                        rows += [{"step": number, **row} for row in new]
        self._check(steps.steps, arm)
        return blocks, cuts

    def _begin(self, stage: Stage) -> StageSteps:
        paired, device = self.parts.paired, self.parts.device
        restore_state(paired.student, self.first)
        nn.ModuleList([paired.student, *paired.student_blocks]).train()
        torch.manual_seed(self.parts.config.seed)
        rates = Rates.of_stage(PlannedStage(stage, 0, self.probing.steps), None, device)
        history = self.probing.steps
        return stage_steps(paired, stage.groups, self.objectives, stage.optimizer, rates=rates, history=history)

    def _check(self, steps: list[GroupStep], arm: str) -> None:
        for step in steps:
            bad = first_not_finite(step.losses.tolist())
            if bad is not None:
                raise TrainingError(
                    f"The loss of blocks {step.name} trained {arm} is not finite at step {bad}. "
                    "Lower the learning rate (--optimizer.lr) or lengthen its warm-up (--optimizer.warmup)."
                )
