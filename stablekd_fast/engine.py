"""The loop: stages, groups, steps."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from stablekd_fast.blocks import PairedBlocks, evaluation_mode
from stablekd_fast.cache.plan import Plan
from stablekd_fast.checkpoint import load_optimizer_tensors, load_tensors, optimizer_tensors, save_tensors
from stablekd_fast.data import Batch, EvalSource, TrainSource
from stablekd_fast.errors import CheckpointError, TrainingError
from stablekd_fast.evaluate import Metrics, evaluate, with_fresh_batch_norm
from stablekd_fast.merge import MergeRecord, composed_output, exposure_gap, probe_losses
from stablekd_fast.report import Recorder
from stablekd_fast.schedule import PlannedStage
from stablekd_fast.step import GroupStep, Objectives, StageInputs, load_batch
from stablekd_fast.teacher import Teacher

PROBE_BATCHES = 4
"""Training batches on which exposure and the loss at a merge are measured."""


@dataclass
class Progress:
    """Where a run stands. With the student and the optimizer state, all that a resume needs."""

    step: int = 0
    train_seconds: float = 0.0
    wait_seconds: float = 0.0
    merge: MergeRecord | None = None
    """The latest merge."""
    exposure: dict[str, float] = field(default_factory=dict)
    """Measured at the end of the latest finished stage."""

    @property
    def seconds(self) -> float:
        """Spent on training steps and on waiting for data, evaluation left out."""
        return self.train_seconds + self.wait_seconds


@dataclass
class StageRun:
    """A stage in training: its groups' steps, and the losses that were not read yet."""

    index: int
    planned: PlannedStage
    steps: list[GroupStep]
    wanted: set[int]
    """The teacher's outputs that the steps read."""
    losses: Tensor
    """`[log_every, groups]` on the device, so that a step need not wait for the host to read its loss."""
    entered_at: int
    entered_seconds: float
    unread: int = 0

    @property
    def names(self) -> list[str]:
        return [step.name for step in self.steps]


@dataclass
class Engine:
    """Trains a paired student through planned stages. Assembled by `Distiller`."""

    paired: PairedBlocks
    teacher: Teacher
    objectives: Objectives
    stages: list[PlannedStage]
    source: TrainSource
    validation: EvalSource | None
    recorder: Recorder | None
    """Set before `train`."""
    checkpoint: Path
    identity: dict
    device: torch.device
    plan: Plan
    """What is kept of the teacher; a resumed run goes on with it."""
    bn_batches: int
    evaluate_every: int
    """Steps; 0 for never."""
    checkpoint_every: int
    log_every: int
    progress: Progress = field(default_factory=Progress)
    _optimizer_state: dict[str, Tensor] = field(default_factory=dict)
    _composed_before_merge: Tensor | None = None

    def train(self) -> None:
        """Train from where the progress stands to the end of the last stage."""
        for index, planned in enumerate(self.stages):
            if self.progress.step >= planned.last:
                continue
            stage = self._enter(index, planned)
            for batch in self._batches(stage):
                self._train_step(stage, batch)
                self._after_step(stage)
            self._leave(stage)

    def composed_student(self) -> nn.Module:
        """A copy of the plain student in eval mode with batch-norm statistics of its own activations."""
        return with_fresh_batch_norm(self.paired.student, self.source.batches(0, self.bn_batches), self.to_device)

    def to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)

    # One step.

    def _batches(self, stage: StageRun) -> Iterator[Batch]:
        first = max(self.progress.step, stage.planned.first)
        source = self.teacher.ahead(self.source.batches(first, stage.planned.last), stage.wanted)
        while True:
            start = time.perf_counter()
            batch = next(source, None)
            self.progress.wait_seconds += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def _train_step(self, stage: StageRun, batch: Batch) -> None:
        start = time.perf_counter()
        settings, share = stage.planned.stage.optimizer, stage.planned.progress(self.progress.step)
        lr, momentum = settings.lr_at(share), settings.momentum_at(share)
        current = "the teacher"
        try:
            load_batch(stage.steps[0].inputs, self.teacher, stage.wanted, batch, self.to_device)
            for i, step in enumerate(stage.steps):
                current = f"group {step.name}"
                step.set_rates(lr, momentum)
                step.run()
                stage.losses[stage.unread, i].copy_(step.loss)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            raise _out_of_memory(error, stage.planned, current, len(batch.labels)) from error
        stage.unread += 1
        self.progress.step += 1
        self.progress.train_seconds += time.perf_counter() - start

    def _after_step(self, stage: StageRun) -> None:
        at, last = self.progress.step, stage.planned.last
        evaluates = self.evaluate_every and at % self.evaluate_every == 0
        saves = at % self.checkpoint_every == 0 and at < last
        if at % self.log_every == 0 or evaluates or saves or at == last:
            self._flush(stage)
        if evaluates or at == self.stages[-1].last:
            self._validate()
        if saves:
            self._save(stage)

    # Stages.

    def _enter(self, index: int, planned: PlannedStage) -> StageRun:
        settings, inputs = planned.stage, StageInputs()
        steps = [GroupStep(self.paired, group, self.objectives, settings.optimizer, inputs) for group in settings.groups]
        if self.progress.step > planned.first or settings.optimizer_state == "carry":
            for step in steps:
                load_optimizer_tensors("optimizer", step.parameters, step.optimizer, self._optimizer_state)
        nn.ModuleList([self.paired.student, *self.paired.student_blocks]).train()
        losses = torch.zeros(self.log_every, len(steps), device=self.device)
        wanted = self.objectives.teacher_outputs(settings.groups, len(self.paired.cuts))
        stage = StageRun(index, planned, steps, wanted, losses, self.progress.step, self.progress.seconds)
        self.recorder.emit(
            "stage_start",
            step=self.progress.step,
            stage=index,
            name=settings.name,
            groups=settings.groups,
            first_step=planned.first,
            last_step=planned.last,
        )
        if self.progress.step == 0:
            self._save(stage)  # so that a run killed at its very first steps can be resumed too
        elif self.progress.step == planned.first:
            self._record_merge(stage)
        return stage

    def _record_merge(self, stage: StageRun) -> None:
        apart = self.stages[stage.index - 1].stage.groups
        probes = list(self.source.batches(0, PROBE_BATCHES))
        images = self.to_device(probes[0].images)
        before = self._composed_before_merge
        if before is None:  # resumed right at the merge: the plain student is what stood before it
            with torch.no_grad(), evaluation_mode(self.paired.student):
                before = self.paired.student(images)
        self.progress.merge = MergeRecord(
            step=stage.planned.first,
            stage=stage.index,
            exposure_gap=self.progress.exposure,
            max_output_difference=(before - composed_output(self.paired, stage.steps, images)).abs().max().item(),
            loss_at_merge=probe_losses(self.paired, self.teacher, stage.steps, probes, self.to_device),
            merged=[step.name for step in stage.steps if step.group not in apart],
        )

    def _leave(self, stage: StageRun) -> None:
        if self.progress.merge and self.progress.merge.stage == stage.index:
            report = self.progress.merge.report()
            self.recorder.emit("merge", **{**report, "merge_step": report["step"], "step": stage.planned.last})
        if len(stage.steps) > 1:
            probes = list(self.source.batches(0, PROBE_BATCHES))
            self.progress.exposure = exposure_gap(self.paired, self.teacher, stage.steps, probes, self.to_device)
            self._composed_before_merge = composed_output(self.paired, stage.steps, self.to_device(probes[0].images))
            self.recorder.emit(
                "stage_end", step=self.progress.step, stage=stage.index, exposure_gap=self.progress.exposure
            )
        self._save(stage)

    # Looking at the run.

    def _flush(self, stage: StageRun) -> None:
        """Read the losses of the steps since the last flush, check them, log them."""
        rows = stage.losses[: stage.unread].tolist()
        stage.unread = 0
        for step in stage.steps:
            bad = step.first_bad.item()
            if bad >= 0:
                raise self._diverged(f"loss of blocks {step.name} is", stage.entered_at + bad)
        if not rows:
            return
        if self.progress.merge:
            for row in rows:
                self.progress.merge.watch(dict(zip(stage.names, row)))
        images = self.source.batch_size * (self.progress.step - stage.entered_at)
        self.recorder.emit(
            "train",
            step=self.progress.step,
            epoch=self.progress.step / self.source.steps_per_epoch,
            losses={name: sum(row[i] for row in rows) / len(rows) for i, name in enumerate(stage.names)},
            lr=stage.planned.stage.optimizer.lr_at(stage.planned.progress(self.progress.step - 1)),
            images_per_second=images / (self.progress.seconds - stage.entered_seconds),
            data_wait_share=self.progress.wait_seconds / self.progress.seconds,
        )

    def _validate(self) -> None:
        if self.validation is None:
            return
        metrics = evaluate(self.composed_student(), self.validation.batches(), self.to_device)
        self.emit_evaluation("validation", metrics)

    def emit_evaluation(self, split: str, metrics: Metrics) -> None:
        self.recorder.emit(
            "evaluate",
            step=self.progress.step,
            epoch=self.progress.step / self.source.steps_per_epoch,
            split=split,
            accuracy=metrics.accuracy,
            top5=metrics.top5,
            loss=metrics.loss,
        )

    def _diverged(self, what: str, step: int) -> TrainingError:
        stage = next(stage for stage in self.stages if step < stage.last)
        return TrainingError(
            f"The {what} not finite at step {step} (stage {stage.stage.name}). Training stopped; the last good "
            f"checkpoint is {self.checkpoint}. Lower the learning rate (--optimizer.lr) or "
            "lengthen its warm-up (--optimizer.warmup)."
        )

    # Saving and resuming.

    def _save(self, stage: StageRun) -> None:
        for step in stage.steps:  # the last update may have broken what the last loss did not show yet
            if not all(torch.isfinite(parameter).all() for parameter in step.parameters.values()):
                raise self._diverged(f"weights of blocks {step.name} are", self.progress.step - 1)
        self._optimizer_state = {}
        for step in stage.steps:
            self._optimizer_state |= optimizer_tensors("optimizer", step.parameters, step.optimizer)
        tensors = {f"student/{name}": value for name, value in self.paired.student.state_dict().items()}
        tensors |= self._optimizer_state
        for k, bridge in enumerate(self.paired.bridges):
            if bridge is not None and bridge.weight is not None:
                tensors[f"bridge/{k}"] = bridge.weight
        tensors["random/cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["random/cuda"] = torch.cuda.get_rng_state(self.device)
        metadata = {
            "identity": self.identity,
            "plan": self.plan.plain(),
            "progress": dataclasses.asdict(self.progress),
        }
        save_tensors(self.checkpoint, tensors, metadata)
        self.recorder.emit("checkpoint", step=self.progress.step)

    def resume(self) -> None:
        """Take student, optimizer state, random state and progress from the checkpoint."""
        tensors, metadata = load_tensors(self.checkpoint)
        self._check_identity(metadata.get("identity", {}))
        progress = metadata["progress"]
        merge = progress.pop("merge")
        self.progress = Progress(**progress, merge=MergeRecord(**merge) if merge else None)
        student = {name.removeprefix("student/"): t for name, t in tensors.items() if name.startswith("student/")}
        self.paired.student.load_state_dict(student)
        self._optimizer_state = {name: t for name, t in tensors.items() if name.startswith("optimizer/")}
        for k, bridge in enumerate(self.paired.bridges):
            if bridge is not None and bridge.weight is not None:
                bridge.weight.copy_(tensors[f"bridge/{k}"])
        torch.set_rng_state(tensors["random/cpu"])
        if self.device.type == "cuda" and "random/cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random/cuda"], self.device)

    def _check_identity(self, saved: dict) -> None:
        differing = sorted(
            key for key in self.identity.keys() | saved.keys() if self.identity.get(key) != saved.get(key)
        )
        if differing:
            listed = "; ".join(f"{k}: was {saved.get(k)!r}, is {self.identity.get(k)!r}" for k in differing)
            raise CheckpointError(
                f"{self.checkpoint} belongs to a run with other settings ({listed}). Resume with the same settings, "
                "or start anew with another --out."
            )


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _out_of_memory(error: RuntimeError, planned: PlannedStage, current: str, batch_size: int) -> TrainingError:
    size = re.search(r"allocate ([\d.]+ ?\w*)", str(error).replace("allocate memory", ""))
    return TrainingError(
        f"Out of memory in stage {planned.stage.name}, {current}: could not allocate "
        f"{size.group(1) if size else 'memory'} with batch size {batch_size}. "
        f"Try --batch-size {max(batch_size // 2, 1)}."
    )
