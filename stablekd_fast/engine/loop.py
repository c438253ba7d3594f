"""The loop: stages, groups, steps."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from stablekd_fast.blocks import PairedBlocks, evaluation_mode
from stablekd_fast.cache.columns import Plan
from stablekd_fast.data import Batch, EvalSource, StreamSource, TrainSource
from stablekd_fast.distributed import Layout, Ranks
from stablekd_fast.engine.checkpoint import (
    check_same_run,
    load_optimizer_tensors,
    load_tensors,
    optimizer_tensors,
    save_tensors,
)
from stablekd_fast.engine.evaluate import Metrics, evaluate, with_fresh_batch_norm
from stablekd_fast.engine.merge import MergeRecord, composed_output, exposure_gap, probe_losses
from stablekd_fast.engine.schedule import PlannedStage
from stablekd_fast.engine.stage import Together
from stablekd_fast.engine.step import GroupStep, Rates, StageInputs, load_batch
from stablekd_fast.errors import TrainingError
from stablekd_fast.execution.capture import HostCopy, Runner, make_runner
from stablekd_fast.execution.memory import watched
from stablekd_fast.objectives import Objectives
from stablekd_fast.report import Recorder
from stablekd_fast.teacher.live import Teacher
from stablekd_fast.teacher.parts import TeacherPart

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


@dataclass(frozen=True)
class Reading:
    """Losses on their way to the host, and the event that waits for them."""

    copy: HostCopy
    position: int
    """Of the stage, behind the last of the losses."""
    unread: int
    event: dict


@dataclass
class StageRun:
    """A stage in training: its groups' steps, and the losses that were not read yet."""

    index: int
    planned: PlannedStage
    together: Together
    wanted: set[int]
    """The teacher's outputs that the own steps read."""
    source: TrainSource | StreamSource
    """Of this process's part of each batch."""
    teacher: Teacher
    entered_at: int
    entered_seconds: float
    runner: Runner | None = None
    """Made with the first batch, when the inputs are laid out."""
    unread: int = 0
    """Steps whose losses are on the device only."""
    reading: Reading | None = None
    current: str = "the teacher"
    """What runs now, for a report of memory that ran out."""

    @property
    def steps(self) -> list[GroupStep]:
        """Of all groups."""
        return self.together.steps

    @property
    def own(self) -> list[GroupStep]:
        """Those that are trained in this process."""
        return self.together.own

    @property
    def names(self) -> list[str]:
        return [step.name for step in self.steps]

    def needs_images(self, sample_ids: Tensor, view: int) -> bool:
        """Whether the images of these samples in this view are needed here: by a group that begins with them, or the
        teacher."""
        return any(step.group[0] == 0 for step in self.own) or self.teacher.needs_images(self.wanted, sample_ids, view)


@dataclass
class Engine:
    """Trains a paired student through planned stages. Assembled by `Distiller`."""

    paired: PairedBlocks
    teacher: Teacher
    objectives: Objectives
    stages: list[PlannedStage]
    source: TrainSource
    """Named views, for what is measured on training images."""
    stream: TrainSource | StreamSource
    """What training takes its batches from: `source`, unless asked for otherwise."""
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
    capture: str = "eager"
    """How steps run, as `pick_capture` gave it."""
    fall_back: bool = True
    """Whether steps that cannot be captured run eagerly."""
    ema: float | None = None
    parts: int = 1
    """In how many parts of a batch gradients are accumulated."""
    sync_norms: bool = False
    ranks: Ranks = field(default_factory=Ranks)
    layouts: list[Layout] = field(default_factory=list)
    """Of each stage; empty for a process alone."""
    image_dtype: torch.dtype = torch.float32
    """Of the images that steps read, as `pick_image_dtype` gave it."""
    progress: Progress = field(default_factory=Progress)
    _optimizer_state: dict[str, Tensor] = field(default_factory=dict)
    _composed_before_merge: Tensor | None = None
    _average: dict[str, Tensor] | None = None
    """The moving average of the student's parameters by name."""

    def train(self) -> None:
        """Train from where the progress stands to the end of the last stage."""
        for index, planned in enumerate(self.stages):
            if self.progress.step >= planned.last:
                continue
            stage = self._enter(index, planned)
            try:
                with closing(self._batches(stage)) as batches:  # a run that fails ends its decoders' threads at once
                    for batch in batches:
                        self._train_step(stage, batch)
                        self._after_step(stage)
                if stage.teacher is not self.teacher:
                    stage.teacher.close()
            finally:
                if stage.runner is not None:
                    stage.runner.close()
                    stage.runner = (
                        None  # its bodies refer to the stage, which would live until the next garbage collection
                    )
            self._leave(stage)

    def composed_student(self) -> nn.Module:
        """A copy of the plain student (of its average, where one is kept) in eval mode with batch-norm statistics of
        its own activations."""
        student = self.paired.student
        if self._average is not None:
            student = copy.deepcopy(student)
            student.load_state_dict(self._average, strict=False)
        return with_fresh_batch_norm(student, self.source.batches(0, self.bn_batches), self.to_device)

    def to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)

    # One step.

    def _batches(self, stage: StageRun) -> Iterator[Batch]:
        first = max(self.progress.step, stage.planned.first)
        batches = stage.source.batches(first, stage.planned.last, self.image_dtype, stage.needs_images)
        source = stage.teacher.ahead(batches, stage.wanted)
        while True:
            start = time.perf_counter()
            batch = next(source, None)
            self.progress.wait_seconds += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def _train_step(self, stage: StageRun, batch: Batch) -> None:
        start = time.perf_counter()
        memory = watched(lambda: f"stage {stage.planned.stage.name}, {stage.current}", len(batch.labels))
        with memory, stage.together.training():
            stage.current = "the teacher"
            load_batch(stage.own[0].inputs, stage.teacher, stage.wanted, batch)
            if stage.runner is None:
                stage.runner = self._runner(stage)
            stage.runner.run()
        stage.unread += 1
        self.progress.step += 1
        self.progress.train_seconds += time.perf_counter() - start

    def _runner(self, stage: StageRun) -> Runner:
        def body(step: GroupStep) -> None:
            stage.current = f"group {step.name}"
            step.run()

        bodies = [partial(body, step) for step in stage.own]
        state = [tensor for step in stage.own for tensor in step.state()]
        return make_runner(self.capture, bodies, state, self.device, fall_back=self.fall_back)

    def _after_step(self, stage: StageRun) -> None:
        at, last = self.progress.step, stage.planned.last
        evaluates = self.evaluate_every and at % self.evaluate_every == 0
        saves = at % self.checkpoint_every == 0 and at < last
        if stage.reading is not None and stage.reading.copy.arrived:
            self._log(stage)
        if self.ranks.size > 1 and at % self.source.steps_per_epoch == 0:
            self._fill(stage)
        if at % self.log_every == 0 or evaluates or saves or at == last:
            self._read_losses(stage)
        if evaluates or saves or at == last:
            stage.together.gather()
            self._log(stage)
        if evaluates or at == self.stages[-1].last:
            self._validate()
        if saves:
            self._save(stage)

    # Stages.

    def _enter(self, index: int, planned: PlannedStage) -> StageRun:
        layout, settings = self._layout(index), planned.stage
        together = Together(self.ranks, layout, self._steps(planned, layout))
        nn.ModuleList([self.paired.student, *self.paired.student_blocks]).train()
        stage = StageRun(
            index=index,
            planned=planned,
            together=together,
            wanted=self.objectives.teacher_outputs([step.group for step in together.own], len(self.paired.cuts)),
            source=self.stream.part(layout.part_of(self.ranks.rank), layout.data),
            teacher=self._teacher(layout, settings.groups),
            entered_at=self.progress.step,
            entered_seconds=self.progress.seconds,
        )
        if self.ranks.size > 1:
            self.ranks.where = lambda: f"step {self.progress.step}, stage {settings.name}"
            self._fill(stage)
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

    def _layout(self, index: int) -> Layout:
        return self.layouts[index] if self.layouts else Layout(places=(0,) * len(self.stages[index].stage.groups))

    def _teacher(self, layout: Layout, groups: list[list[int]]) -> Teacher:
        """In training; what is measured in between asks the whole teacher."""
        return TeacherPart(self.paired, layout, groups, self.ranks, self.device) if layout.relays else self.teacher

    def _fill(self, stage: StageRun) -> None:
        """Fill the cache together with the other ranks."""
        self.teacher.fill(stage.together.stores(len(self.paired.cuts)))
        if self.source.crops is not None and self.source.crops.stored is not None:
            self.source.crops.stored.refresh()

    def _steps(self, planned: PlannedStage, layout: Layout) -> list[GroupStep]:
        settings, inputs = planned.stage, StageInputs(self.device)
        if self.ema is not None and self._average is None:
            self._average = {name: p.detach().clone() for name, p in self.paired.student.named_parameters()}
        rates = Rates.of_stage(planned, self.ema, self.device)
        averaging = layout.averaging(self.ranks, self.device)
        steps = [
            GroupStep(
                self.paired,
                group,
                self.objectives,
                settings.optimizer,
                inputs,
                rates=rates,
                position=self.progress.step - planned.first,
                history=self.log_every,
                ema=self._average,
                compiled=self.capture == "compile",
                parts=self.parts,
                averaging=averaging,
                sync_norms=self.sync_norms,
            )
            for group in settings.groups
        ]
        resumed = self.progress.step > planned.first
        for step in steps:
            if resumed or settings.optimizer_state == "carry":
                load_optimizer_tensors("optimizer", step.parameters, step.optimizer, self._optimizer_state)
            if resumed and step.loss_scale is not None:
                for name, value in step.loss_scale.state().items():
                    value.copy_(self._optimizer_state[f"loss_scale/{step.name}/{name}"])
        return steps

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
            loss_at_merge=probe_losses(self.paired, self.teacher, stage.steps, self._as_trained(probes)),
            merged=[step.name for step in stage.steps if step.group not in apart],
        )

    def _leave(self, stage: StageRun) -> None:
        if self.ranks.size > 1:
            done, seconds = self.progress.step - stage.entered_at, self.progress.seconds - stage.entered_seconds
            layout = stage.together.layout
            self.recorder.emit(
                "ranks",
                step=self.progress.step,
                stage=stage.index,
                mesh={"blocks": layout.blocks, "data": layout.data},
                ranks=stage.together.report(max(done, 1), seconds),
            )
        if self.progress.merge and self.progress.merge.stage == stage.index:
            report = self.progress.merge.report()
            self.recorder.emit("merge", **{**report, "merge_step": report["step"], "step": stage.planned.last})
        if len(stage.steps) > 1:
            probes = list(self.source.batches(0, PROBE_BATCHES))
            self.progress.exposure = exposure_gap(self.paired, self.teacher, stage.steps, self._as_trained(probes))
            self._composed_before_merge = composed_output(self.paired, stage.steps, self.to_device(probes[0].images))
            self.recorder.emit(
                "stage_end", step=self.progress.step, stage=stage.index, exposure_gap=self.progress.exposure
            )
        self._save(stage)

    def _as_trained(self, batches: list[Batch]) -> Iterator[Batch]:
        """With images as steps read them; the composed student computes in float32."""
        return (dataclasses.replace(batch, images=batch.images.to(self.image_dtype)) for batch in batches)

    # Looking at the run.

    def _read_losses(self, stage: StageRun) -> None:
        """Start reading the losses of the steps since the last time; `_log` takes them when they are there."""
        if stage.reading is not None:
            self._log(stage)
        if not stage.unread:
            return
        self.progress.train_seconds += stage.together.share_losses()
        images = self.source.batch_size * (self.progress.step - stage.entered_at)
        position = self.progress.step - stage.planned.first
        event = {
            "step": self.progress.step,
            "epoch": self.progress.step / self.source.steps_per_epoch,
            "lr": stage.planned.stage.optimizer.lr_at(stage.planned.progress(self.progress.step - 1)),
            "images_per_second": images / (self.progress.seconds - stage.entered_seconds),
            "data_wait_share": self.progress.wait_seconds / self.progress.seconds,
        }
        copied = HostCopy([tensor for step in stage.steps for tensor in (step.losses, step.first_bad)])
        stage.reading, stage.unread = Reading(copied, position, stage.unread, event), 0
        if copied.arrived:
            self._log(stage)

    def _log(self, stage: StageRun) -> None:
        """Take the losses that are being read, check them, log them."""
        reading, stage.reading = stage.reading, None
        if reading is None:
            return
        start = time.perf_counter()
        values = reading.copy.values()
        self.progress.train_seconds += time.perf_counter() - start
        for step, bad in zip(stage.steps, values[1::2]):
            if bad >= 0:
                raise self._diverged(f"loss of blocks {step.name} is", stage.planned.first + int(bad))
        slots = [place % self.log_every for place in range(reading.position - reading.unread, reading.position)]
        columns = [losses[slots].tolist() for losses in values[::2]]
        if self.progress.merge:
            for row in zip(*columns):
                self.progress.merge.watch(dict(zip(stage.names, row)))
        means = {name: sum(column) / len(column) for name, column in zip(stage.names, columns)}
        self.recorder.emit("train", losses=means, **reading.event)

    def _validate(self) -> None:
        if self.validation is None:
            return
        metrics = evaluate(self.composed_student(), self.validation.batches(), self.to_device, self.ranks.all_reduce)
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
            if step.loss_scale is not None:
                scale = step.loss_scale.state()
                self._optimizer_state |= {f"loss_scale/{step.name}/{name}": value for name, value in scale.items()}
        tensors = {f"student/{name}": value for name, value in self.paired.student.state_dict().items()}
        tensors |= self._optimizer_state
        tensors |= {f"average/{name}": value for name, value in (self._average or {}).items()}
        for k, bridge in enumerate(self.paired.bridges):
            if bridge is not None and bridge.weight is not None:
                tensors[f"bridge/{k}"] = bridge.weight
        tensors["random/cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["random/cuda"] = torch.cuda.get_rng_state(self.device)
        metadata = {
            "identity": self.identity,
            "plan": self.plan.plain(),
            "precision": self.paired.precision.name,
            "progress": dataclasses.asdict(self.progress),
            "layouts": [self.ranks.size, [dataclasses.asdict(layout) for layout in self.layouts]],
        }
        if self.ranks.is_first:
            save_tensors(self.checkpoint, tensors, metadata)
        self.recorder.emit("checkpoint", step=self.progress.step)

    def resume(self) -> None:
        """Take student, optimizer state, random state and progress from the checkpoint."""
        tensors, metadata = self.ranks.from_first(lambda: load_tensors(self.checkpoint))
        check_same_run(self.checkpoint, metadata.get("identity", {}), self.identity)
        progress = metadata["progress"]
        merge = progress.pop("merge")
        self.progress = Progress(**progress, merge=MergeRecord(**merge) if merge else None)
        student = {name.removeprefix("student/"): t for name, t in tensors.items() if name.startswith("student/")}
        self.paired.student.load_state_dict(student)
        kept = ("optimizer/", "loss_scale/")
        self._optimizer_state = {name: t for name, t in tensors.items() if name.startswith(kept)}
        if self.ema is not None:
            averaged = {name.removeprefix("average/"): t for name, t in tensors.items() if name.startswith("average/")}
            self._average = {
                name: torch.empty_like(p).copy_(averaged[name]) for name, p in self.paired.student.named_parameters()
            }
        for k, bridge in enumerate(self.paired.bridges):
            if bridge is not None and bridge.weight is not None:
                bridge.weight.copy_(tensors[f"bridge/{k}"])
        torch.set_rng_state(tensors["random/cpu"])
        if self.device.type == "cuda" and "random/cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random/cuda"], self.device)
