"""The loop: stages, groups, steps."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from stablekd_fast.blocks import PairedBlocks, evaluation_mode
from stablekd_fast.checkpoint import load_optimizer_tensors, load_tensors, optimizer_tensors, save_tensors
from stablekd_fast.data import Batch, EvalSource, TrainSource
from stablekd_fast.errors import CheckpointError, TrainingError
from stablekd_fast.evaluate import Metrics, evaluate, with_fresh_batch_norm
from stablekd_fast.merge import MergeRecord, composed_output, exposure_gap, probe_losses
from stablekd_fast.report import Recorder
from stablekd_fast.schedule import PlannedStage
from stablekd_fast.step import GroupStep, Objectives, StageInputs, load_batch

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
class Engine:
    """Trains a paired student through planned stages. Assembled by `Distiller`."""

    paired: PairedBlocks
    objectives: Objectives
    stages: list[PlannedStage]
    source: TrainSource
    validation: EvalSource | None
    recorder: Recorder
    checkpoint: Path
    identity: dict
    device: torch.device
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
        for index, stage in enumerate(self.stages):
            if self.progress.step >= stage.last:
                continue
            steps = self._enter(index, stage)
            for batch in self._batches(stage):
                self._train_step(stage, steps, batch)
                self._after_step(stage, steps)
            self._leave(index, stage, steps)

    def composed_student(self) -> torch.nn.Module:
        """A copy of the plain student in eval mode with batch-norm statistics of its own activations."""
        return with_fresh_batch_norm(self.paired.student, self.source.batches(0, self.bn_batches), self.to_device)

    def to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)

    # One step.

    def _batches(self, stage: PlannedStage) -> Iterator[Batch]:
        source = self.source.batches(max(self.progress.step, stage.first), stage.last)
        while True:
            start = time.perf_counter()
            batch = next(source, None)
            self.progress.wait_seconds += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def _train_step(self, stage: PlannedStage, steps: list[GroupStep], batch: Batch) -> None:
        start = time.perf_counter()
        progress = stage.progress(self.progress.step)
        settings = stage.stage.optimizer
        lr, momentum = settings.lr_at(progress), settings.momentum_at(progress)
        current = "the teacher"
        try:
            images, labels = self.to_device(batch.images), self.to_device(batch.labels)
            load_batch(steps[0].inputs, self.paired, stage.stage.groups, self.objectives, images, labels)
            for i, step in enumerate(steps):
                current = f"group {step.name}"
                step.set_rates(lr, momentum)
                step.run()
                self._losses[self._logged, i].copy_(step.loss)
        except RuntimeError as error:
            raise _explained(error, stage, current, len(batch.labels)) from error
        self._logged += 1
        self.progress.step += 1
        self.progress.train_seconds += time.perf_counter() - start

    def _after_step(self, stage: PlannedStage, steps: list[GroupStep]) -> None:
        at = self.progress.step
        evaluates = self.evaluate_every and at % self.evaluate_every == 0
        saves = at % self.checkpoint_every == 0 and at < stage.last
        if at % self.log_every == 0 or evaluates or saves or at == stage.last:
            self._flush(stage, steps)
        if evaluates or at == self.stages[-1].last:
            self._validate()
        if saves:
            self._save(steps)

    # Stages.

    def _enter(self, index: int, stage: PlannedStage) -> list[GroupStep]:
        inputs = StageInputs()
        steps = [
            GroupStep(self.paired, group, self.objectives, stage.stage.optimizer, inputs) for group in stage.stage.groups
        ]
        if self.progress.step > stage.first or stage.stage.optimizer_state == "carry":
            for step in steps:
                load_optimizer_tensors("optimizer", step.parameters, step.optimizer, self._optimizer_state)
        self._losses = torch.zeros(max(self.log_every, 1), len(steps), device=self.device)
        self._logged = 0
        self.paired.student.train()
        for block in self.paired.student_blocks:
            block.train()
        self._entered_at, self._entered_seconds = self.progress.step, self.progress.seconds
        self.recorder.emit(
            "stage_start",
            step=self.progress.step,
            stage=index,
            name=stage.stage.name,
            groups=stage.stage.groups,
            first_step=stage.first,
            last_step=stage.last,
        )
        if index > 0 and self.progress.step == stage.first:
            self._record_merge(index, stage, steps)
        return steps

    def _record_merge(self, index: int, stage: PlannedStage, steps: list[GroupStep]) -> None:
        apart = self.stages[index - 1].stage.groups
        probes = list(self.source.batches(0, PROBE_BATCHES))
        images = self.to_device(probes[0].images)
        before = self._composed_before_merge
        if before is None:  # resumed right at the merge: the plain student is what stood before it
            with torch.no_grad(), evaluation_mode(self.paired.student):
                before = self.paired.student(images)
        self.progress.merge = MergeRecord(
            step=stage.first,
            stage=index,
            exposure_gap=self.progress.exposure,
            max_output_difference=(before - composed_output(self.paired, steps, images)).abs().max().item(),
            loss_at_merge=probe_losses(self.paired, steps, probes, self.to_device),
            merged=[step.name for step in steps if step.group not in apart],
        )

    def _leave(self, index: int, stage: PlannedStage, steps: list[GroupStep]) -> None:
        if self.progress.merge and self.progress.merge.stage == index:
            report = self.progress.merge.report()
            self.recorder.emit("merge", **{**report, "merge_step": report["step"], "step": stage.last})
        if len(steps) > 1:
            probes = list(self.source.batches(0, PROBE_BATCHES))
            self.progress.exposure = exposure_gap(self.paired, steps, probes, self.to_device)
            images = self.to_device(probes[0].images)
            self._composed_before_merge = composed_output(self.paired, steps, images)
        self._save(steps)

    # Looking at the run.

    def _flush(self, stage: PlannedStage, steps: list[GroupStep]) -> None:
        """Read the losses of the steps since the last flush, check them, log them."""
        rows = self._losses[: self._logged].tolist()
        self._logged = 0
        for step in steps:
            bad = step.first_bad.item()
            if bad >= 0:
                raise self._diverged(f"loss of blocks {step.name} is", self._entered_at + bad)
        names = [step.name for step in steps]
        for row in rows:
            if self.progress.merge:
                self.progress.merge.watch(dict(zip(names, row)))
        if rows:
            images = self.source.batch_size * (self.progress.step - self._entered_at)
            self.recorder.emit(
                "train",
                step=self.progress.step,
                epoch=self.progress.step / self.source.steps_per_epoch,
                losses={name: sum(row[i] for row in rows) / len(rows) for i, name in enumerate(names)},
                lr=stage.stage.optimizer.lr_at(stage.progress(self.progress.step - 1)),
                images_per_second=images / (self.progress.seconds - self._entered_seconds),
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
            f"checkpoint, if one was written, is {self.checkpoint}. Lower the learning rate (--optimizer.lr) or "
            "lengthen its warm-up (--optimizer.warmup)."
        )

    # Saving and resuming.

    def _save(self, steps: list[GroupStep]) -> None:
        for step in steps:  # the last update may have broken what the last loss did not show yet
            if not all(torch.isfinite(parameter).all() for parameter in step.parameters.values()):
                raise self._diverged(f"weights of blocks {step.name} are", self.progress.step - 1)
        self._optimizer_state = {}
        for step in steps:
            self._optimizer_state |= optimizer_tensors("optimizer", step.parameters, step.optimizer)
        tensors = {f"student/{name}": value for name, value in self.paired.student.state_dict().items()}
        tensors |= self._optimizer_state
        for k, bridge in enumerate(self.paired.bridges):
            if bridge is not None and bridge.weight is not None:
                tensors[f"bridge/{k}"] = bridge.weight
        tensors["random/cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["random/cuda"] = torch.cuda.get_rng_state(self.device)
        metadata = {"identity": self.identity, "progress": dataclasses.asdict(self.progress)}
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


def _explained(error: RuntimeError, stage: PlannedStage, current: str, batch_size: int) -> Exception:
    """Out of memory becomes a TrainingError that names stage, group and bytes; anything else stays as it is."""
    text = str(error)
    if not (isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text):
        return error
    size = re.search(r"allocate ([\d.]+ ?\w*)", text.replace("allocate memory", ""))
    return TrainingError(
        f"Out of memory in stage {stage.stage.name}, {current}: could not allocate "
        f"{size.group(1) if size else 'memory'} with batch size {batch_size}. "
        f"Try --batch-size {max(batch_size // 2, 1)}."
    )
