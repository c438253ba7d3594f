"""The loop: stages, groups, steps."""

from __future__ import annotations

import copy
import signal
import sys
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from typing import NoReturn

import torch
from torch import Tensor, nn

from stablekd_fast.data import Batch, with_second
from stablekd_fast.distributed import Layout
from stablekd_fast.engine.alignment import Alignment, aligned, compared
from stablekd_fast.engine.checkpoint import RunState, save_run
from stablekd_fast.engine.evaluate import Metrics, evaluate, not_finite, with_fresh_batch_norm
from stablekd_fast.engine.feed import Feed
from stablekd_fast.engine.merge import Merges
from stablekd_fast.engine.parts import Parts
from stablekd_fast.engine.schedule import PlannedStage
from stablekd_fast.engine.stage import DividedSteps, LossReader, StageRun, bodies_of, stage_steps
from stablekd_fast.engine.step import GroupStep, Rates
from stablekd_fast.engine.stops import Stops
from stablekd_fast.errors import Interrupted, TrainingError
from stablekd_fast.execution.capture import COMPILED, Runner, make_runner
from stablekd_fast.execution.memory import watched
from stablekd_fast.execution.moments import Clock, Moment
from stablekd_fast.execution.side import Side
from stablekd_fast.execution.signals import Signals
from stablekd_fast.models.outputs import logits_of
from stablekd_fast.models.weights import restore_state
from stablekd_fast.report import NoRecorder, Recorder
from stablekd_fast.teacher.live import Teacher
from stablekd_fast.teacher.parts import TeacherPart

_STEPS_AHEAD = 8
"""So many steps the host may be ahead of the device where it shares a run with other ranks: were one of them lost, more
steps in the device's queue would make the host wait where it cannot be told."""
_STEPS_TO_STOP = 10
"""Ranks that meet in every step look so often whether one of them was asked to stop."""


class Engine:
    """Trains a paired student through planned stages, from where the state stands to the end of the last stage."""

    def __init__(
        self, parts: Parts, state: RunState, recorder: Recorder | NoRecorder, signals: Signals | None = None
    ) -> None:
        self.parts, self.state, self.recorder = parts, state, recorder
        self.signals = signals or Signals()
        self.ranks, self.progress = parts.ranks, state.progress
        self.merges = Merges(parts, self.progress)
        self.clock = Clock(parts.device)
        self._under_way: deque[Moment] = deque()

    def train(self) -> None:
        """Train every stage that is not finished yet.

        Raises Interrupted, with all saved, after the step in which a signal asked for an end.
        """
        self._learn()
        for index, planned in enumerate(self.parts.stages):
            if self.progress.step >= planned.last:
                continue
            stage = self._enter(index, planned)
            try:
                with closing(self._batches(stage)) as batches:  # a run that fails ends its decoders' threads at once
                    for feed in batches:
                        self._train_step(stage, feed)
                        self._after_step(stage)
                        if stage.stopped_by is not None and self.progress.step < planned.last:
                            self._stop(stage.stopped_by)
                if stage.teacher is not self.parts.teacher:
                    stage.teacher.close()
            finally:
                if stage.runner is not None:
                    stage.runner.close()
                    stage.runner = None  # its bodies refer to the stage, which would live until the next collection
            self._leave(stage)
            if stage.stopped_by is not None and planned is not self.parts.stages[-1]:
                self._stop(stage.stopped_by)

    def _learn(self) -> None:
        """Let the auxiliary loss learn what it needs before the first step. A run that ends meanwhile begins anew."""
        module, paired = self.parts.objectives.module, self.parts.paired
        if module is None or not module.learns or self.progress.step:
            return
        head = len(paired.cuts)
        with self.clock.timing("training"), closing(self.parts.source.batches(0, sys.maxsize)) as batches:
            images = (self.to_device(batch.pixels) for batch in batches)
            module.learn(images, lambda images: paired.teacher_outputs(images, [head])[head])
        self._take_times(wait=True)

    def _stop(self, number: int) -> NoReturn:
        """End the run, whose state is saved, as a signal has asked."""
        self.ranks.finish()  # torchrun ends all as soon as one has ended
        at, last = self.progress.step, self.parts.stages[-1].last
        raise Interrupted(
            f"Ended by {signal.Signals(number).name} after step {at} of {last}, which is saved in "
            f"{self.parts.checkpoint}. The same command with --resume goes on from there.",
            number,
        )

    def composed_student(self) -> nn.Module:
        """Return a copy of the plain student (of its average, where one is kept) in eval mode, with batch-norm
        statistics of its own activations."""
        student = self.parts.paired.student
        if self.state.average is not None:
            student = copy.deepcopy(student)
            restore_state(student, self.state.average, partial=True)
        return with_fresh_batch_norm(student, self.parts.source.batches(0, self.parts.bn_batches), self.to_device)

    def check_composed(self, student: nn.Module) -> None:
        """Raise TrainingError unless what is exported is finite, and its logits on training images too."""
        found, at = not_finite(student.state_dict()), self.progress.step - 1
        if found:
            raise self._diverged(f"composed student's {found} is", at)
        for batch in self.parts.source.batches(0, 1):
            with torch.no_grad():
                logits = logits_of(student(self.to_device(batch.pixels)))
            if not_finite({"logits": logits}):
                raise self._diverged("logits of the composed student are", at)

    def to_device(self, tensor: Tensor) -> Tensor:
        """Copy a tensor to the device of the run."""
        return tensor.to(self.parts.device, non_blocking=True)

    # One step.

    def _batches(self, stage: StageRun) -> Generator[Feed, None, None]:
        """The rest of the stage's batches, each made ready; the time that they are waited for is noted."""
        first = max(self.progress.step, stage.planned.first)
        dtype = self.parts.execution.image_dtype
        batches = stage.source.batches(first, stage.planned.last, dtype, stage.needs_images)
        if second := next((step.auxiliary.second for step in stage.own if step.auxiliary is not None), None):
            batches = with_second(batches, stage.source, second, first, dtype)
        feed = Feed(stage.teacher, batches, stage.wanted, stage.side)
        while True:
            if self.parts.synthesised is not None and self.progress.step < stage.planned.last:
                with self._training(stage, "its images"):
                    self.parts.synthesised.before_step(self.progress.step)
            with self.clock.timing("waiting"):
                batch = feed.fetch()
            if batch is None:
                return
            with self._training(stage, "the teacher"):
                feed.serve(stage.own[0].inputs)
            yield feed

    @contextmanager
    def _training(self, stage: StageRun, what: str) -> Iterator[None]:
        """Time and memory are those of training, and of `what` to begin with."""
        stage.current, size = what, self.parts.source.batch_size
        memory = watched(lambda: f"stage {stage.planned.stage.name}, {stage.current}", size)
        with self.clock.timing("training"), memory, stage.divided.training():
            yield

    def _train_step(self, stage: StageRun, feed: Feed) -> None:
        with self._training(stage, "its inputs"):
            feed.load(stage.own[0].inputs)
            if stage.runner is None:
                stage.runner = self._runner(stage)
            stage.runner.run()
        stage.losses.unread += 1
        self.progress.step += 1
        if self.ranks.size > 1:
            self._under_way.append(Moment(self.parts.device))
            self._catch_up(_STEPS_AHEAD)

    def _runner(self, stage: StageRun) -> Runner:
        def told(name: str) -> None:
            stage.current = f"group {name}"

        first, *then = bodies_of(stage.own, told)
        state = [tensor for step in stage.own for tensor in step.state()]
        execution = self.parts.execution
        return make_runner(execution.capture, first, state, self.parts.device, fall_back=execution.fall_back, then=then)

    def _catch_up(self, ahead: int) -> None:
        """Wait until the device is at most `ahead` steps behind, or until it is clear that a rank is lost."""
        while len(self._under_way) > ahead:
            self.ranks.wait(self._under_way.popleft(), "a step ends")

    def _take_times(self, until: int | None = None, *, wait: bool = False) -> None:
        """Add the times that the clock has by now to those of the run."""
        seconds = self.clock.collect(until, wait=wait)
        self.progress.train_seconds += seconds.get("training", 0.0)
        self.progress.wait_seconds += seconds.get("waiting", 0.0)

    def _after_step(self, stage: StageRun) -> None:
        at, last, every = self.progress.step, stage.planned.last, self.parts.intervals
        stage.stopped_by = stage.stops.due(at)
        evaluates = every.evaluate and at % every.evaluate == 0
        saves = (at % every.checkpoint == 0 or stage.stopped_by is not None) and at < last
        if stage.losses.arrived:
            self._log(stage)
        if self.ranks.size > 1 and at % self.parts.source.steps_per_epoch == 0:
            self._fill(stage)
        if at % every.log == 0 or evaluates or saves or at == last:
            self._read_losses(stage)
        if evaluates or saves or at == last:
            self._catch_up(0)
            stage.side.halt()
            stage.divided.broadcast_state()
            self._log(stage)
            self._take_times(wait=True)
        if evaluates or at == self.parts.stages[-1].last:
            self._validate()
        if saves:
            self._save(stage)

    # Stages.

    def _enter(self, index: int, planned: PlannedStage) -> StageRun:
        layout, settings, paired = self.parts.layout(index), planned.stage, self.parts.paired
        divided = DividedSteps(self.ranks, layout, self._steps(planned, layout))
        nn.ModuleList([paired.student, *paired.student_blocks]).train()
        own = [step.group for step in divided.own]
        stage = StageRun(
            index=index,
            planned=planned,
            divided=divided,
            wanted=self.parts.objectives.teacher_outputs(own, len(paired.cuts)),
            source=self.parts.stream.part(layout.part_of(self.ranks.rank), layout.data),
            teacher=self._teacher(layout, settings.groups),
            side=Side(self.parts.device, used=not layout.hands_on and self.parts.synthesised is None),
            losses=LossReader(divided.steps),
            stops=self._stops(layout),
            entered_at=self.progress.step,
            entered_seconds=self.progress.seconds,
        )
        if self.ranks.size > 1:
            self.ranks.where = lambda: f"step {self.progress.step}, stage {settings.name}"
            self._fill(stage)
            divided.broadcast_random_states()  # what was measured until now may have drawn, on each rank something else
        self.recorder.emit(
            "stage_start",
            step=self.progress.step,
            stage=stage.index,
            name=settings.name,
            groups=settings.groups,
            first_step=planned.first,
            last_step=planned.last,
        )
        if self.progress.step == 0:
            self._save(stage)  # so that a run killed at its very first steps can be resumed too
        elif self.progress.step == planned.first:
            self.merges.enter(stage.index, stage.steps)
        return stage

    def _stops(self, layout: Layout) -> Stops:
        log = self.parts.intervals.log
        together = layout.blocks == 1  # all ranks average their gradients in every step
        every, meets = (min(_STEPS_TO_STOP, log), 1) if together else (log, log)
        return Stops(self.signals, self.ranks, every, meets, _STEPS_AHEAD)

    def _teacher(self, layout: Layout, groups: list[list[int]]) -> Teacher:
        """The teacher that training asks; what is measured in between asks the whole teacher."""
        if not layout.hands_on:
            return self.parts.teacher
        return TeacherPart(self.parts.paired, layout, groups, self.ranks, self.parts.device)

    def _fill(self, stage: StageRun) -> None:
        """Fill the cache together with the other ranks."""
        self.parts.teacher.fill(stage.divided.stores(len(self.parts.paired.cuts)))
        self.parts.source.refresh_stored()

    def _steps(self, planned: PlannedStage, layout: Layout) -> list[GroupStep]:
        """The steps of all groups of a stage, with the optimizer states that they go on with."""
        settings, execution = planned.stage, self.parts.execution
        average = None if execution.ema is None else self.state.start_average(self.parts.paired.student)
        steps = stage_steps(
            self.parts.paired,
            settings.groups,
            self.parts.objectives,
            settings.optimizer,
            rates=Rates.of_stage(planned, execution.ema, self.parts.device),
            position=self.progress.step - planned.first,
            history=self.parts.intervals.log,
            ema=average,
            compiled=execution.capture in COMPILED,
            micro_batches=execution.micro_batches,
            averaging=layout.averaging(self.ranks, self.parts.device),
            sync_norms=execution.sync_norms,
        ).steps
        resumed = self.progress.step > planned.first
        if resumed or settings.optimizer_state == "carry":
            self.state.give_optimizers(steps, scales=resumed)
        return steps

    def _leave(self, stage: StageRun) -> None:
        if self.ranks.size > 1:
            done, seconds = self.progress.step - stage.entered_at, self.progress.seconds - stage.entered_seconds
            layout = stage.divided.layout
            self.recorder.emit(
                "ranks",
                step=self.progress.step,
                stage=stage.index,
                mesh={"blocks": layout.blocks, "data": layout.data},
                ranks=stage.divided.report(max(done, 1), seconds),
            )
        merge = self.progress.merge
        if merge is not None and merge.stage == stage.index:
            report = merge.report()
            self.recorder.emit("merge", **{**report, "merge_step": report["step"], "step": stage.planned.last})
        if len(stage.steps) > 1:
            gap = self.merges.leave(stage.steps)
            self.recorder.emit("stage_end", step=self.progress.step, stage=stage.index, exposure_gap=gap)
        self._save(stage)

    # Looking at the run.

    def _read_losses(self, stage: StageRun) -> None:
        """Start reading the losses of the steps since the last time; `_log` takes them when they are there."""
        self._log(stage)
        if not stage.losses.unread:
            return
        with self.clock.timing("training"):
            stage.divided.broadcast_losses()
        planned, step = stage.planned, self.progress.step
        event = {
            "step": step,
            "epoch": step / self.parts.source.steps_per_epoch,
            "lr": planned.stage.optimizer.lr_at(planned.progress(step - 1)),
        }
        stage.losses.start(step - planned.first, event, self.clock.count)
        if stage.losses.arrived:
            self._log(stage)

    def _log(self, stage: StageRun) -> None:
        """Take the losses that are being read, check them, log them; nothing where none are."""
        with self.clock.timing("training"):
            losses = stage.losses.take(lambda moment: self.ranks.wait(moment, "losses are read"))
        if losses is None:
            return
        self._take_times(losses.timings)
        images = self.parts.source.batch_size * (losses.event["step"] - stage.entered_at)
        speed = {
            "images_per_second": images / (self.progress.seconds - stage.entered_seconds),
            "data_wait_share": self.progress.wait_seconds / self.progress.seconds,
        }
        if losses.first_bad:
            name, step = next(iter(losses.first_bad.items()))
            raise self._diverged(f"loss of blocks {name} is", stage.planned.first + step)
        if self.progress.merge is not None:
            for row in losses.by_step:
                self.progress.merge.watch(row)
        self.recorder.emit("train", losses=losses.means(), **losses.event, **speed)

    def _validate(self) -> None:
        if self.parts.validation is not None:
            metrics = self.measured(self.composed_student(), self.parts.validation.batches())
            if not metrics.finite:
                raise self._diverged("loss on held-out images is", self.progress.step - 1)
            self.emit_evaluation("validation", metrics, self.parts.validation.truth)

    def measured(self, student: nn.Module, batches: Iterable[Batch]) -> Metrics | Alignment:
        """What a composed student reaches on images: how near it comes to its teacher, where it has no classifier."""
        if self.parts.paired.head == "classifier":
            return evaluate(student, batches, self.to_device, self.ranks.all_reduce)
        pair = compared(self.parts.paired, self.parts.objectives, student)
        return aligned(pair, batches, self.to_device, self.ranks.all_reduce)

    def emit_evaluation(self, split: str, metrics: Metrics | Alignment, truth: str) -> None:
        """Log what the composed student reaches on a split; an accuracy is held against `truth`, labels or teacher."""
        self.recorder.emit(
            "evaluate",
            step=self.progress.step,
            epoch=self.progress.step / self.parts.source.steps_per_epoch,
            split=split,
            truth=truth,
            seconds=self.progress.seconds,
            **metrics.event(),
        )

    def _diverged(self, what: str, step: int) -> TrainingError:
        stage = next(stage for stage in self.parts.stages if step < stage.last)
        return TrainingError(
            f"The {what} not finite at step {step} (stage {stage.stage.name}). Training stopped; the last good "
            f"checkpoint is {self.parts.checkpoint}. Lower the learning rate (--optimizer.lr) or "
            "lengthen its warm-up (--optimizer.warmup)."
        )

    def _save(self, stage: StageRun) -> None:
        at = self.progress.step - 1
        for step in stage.steps:  # the last update may have broken what the last loss did not show yet
            if not_finite(step.parameters):
                raise self._diverged(f"weights of blocks {step.name} are", at)
        for kept in (self.parts.paired.student.state_dict(), self.state.average or {}):
            if name := not_finite(kept):
                raise self._diverged(f"student's {name} is", at)
        self.state.take_optimizers(stage.steps)
        self.parts.teacher.settle()  # a run that goes on from here finds the rows of all steps before
        if self.ranks.is_first:
            save_run(self.parts, self.state)
        self.recorder.emit("checkpoint", step=self.progress.step)
