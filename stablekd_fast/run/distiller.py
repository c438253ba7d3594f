"""Assemble a run from its settings: data, models, blocks, schedule, engine. The Python face of `stablekd distill`."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from stablekd_fast import models
from stablekd_fast.blocks import PairedBlocks, pair_blocks, pick_fusion
from stablekd_fast.blocks.pair import copy_head
from stablekd_fast.cache.columns import Plan
from stablekd_fast.cache.fingerprint import image_fingerprint
from stablekd_fast.cache.image_column import ImageColumn
from stablekd_fast.config import DistillConfig, identity, objectives_of
from stablekd_fast.data import Dataset, EvalSource, Split, open_dataset
from stablekd_fast.distributed import Layout, join
from stablekd_fast.engine.checkpoint import load_metadata, save_tensors
from stablekd_fast.engine.evaluate import evaluate
from stablekd_fast.engine.loop import Engine
from stablekd_fast.engine.schedule import PlannedStage, method_stages, plan_stages
from stablekd_fast.errors import ConfigError, ModelError, nearest
from stablekd_fast.execution.capture import pick_capture
from stablekd_fast.execution.memory import placed, watched
from stablekd_fast.execution.precision import Precision, pick_precision, seconds_per_pass
from stablekd_fast.objectives import Objectives
from stablekd_fast.planning.costs import Planner, views_shown
from stablekd_fast.planning.ranks import measured_layouts
from stablekd_fast.planning.rows import Costs, decisions, predict
from stablekd_fast.report import NoRecorder, Recorder, machine, versions, write_results, write_run_report
from stablekd_fast.run.builders import (
    bn_batches,
    cache_settings,
    eval_source,
    fingerprint,
    pick_device,
    pick_image_dtype,
    split_training_images,
    train_source,
    training_stream,
)
from stablekd_fast.teacher.cached import CachedTeacher
from stablekd_fast.teacher.live import LiveTeacher, Relay, Teacher

CALIBRATION_BATCHES = 2
"""Training batches to which bridges are fitted."""

TRIAL_IMAGES = 8
"""Images on which it is tried whether networks round them first of all."""


@dataclass(frozen=True)
class RunResult:
    """What one run reached; `accuracy` and `top5` (0 to 1) are of the exported student on the test split."""

    method: str
    seed: int
    accuracy: float
    top5: float
    epochs: float
    steps: int
    images_per_second: float
    wall_seconds: float
    """Training and waiting for data, evaluation left out; summed over resumes."""
    data_wait_share: float = 0.0
    """Of `wall_seconds`, the share spent on waiting for the next batch."""
    skipped_images: int = 0
    """Unreadable images left out (with `on_bad_image="skip"`); the event log names them."""


class Distiller:
    """One distillation run.

    Args:
        config: the settings.
        teacher, student: modules to use instead of the names in the settings. The teacher comes with its weights.
        dataset: a data set to use instead of the path in the settings.
        paired: blocks made by `pair_blocks` to use instead of cutting here, for models that need block lists by hand.

    Raises ConfigError, DataError, ModelError or CutError if the parts do not fit.
    """

    def __init__(
        self,
        config: DistillConfig,
        *,
        teacher: nn.Module | None = None,
        student: nn.Module | None = None,
        dataset: Dataset | None = None,
        paired: PairedBlocks | None = None,
    ) -> None:
        self.config = config
        self.device = pick_device(config.device)
        self.ranks = join(self.device, config.timeout)
        self.checkpoint = Path(config.out) / "checkpoint.safetensors"
        self.resume = config.resume or self.ranks.from_first(lambda: self.ranks.restarted and self.checkpoint.exists())
        """Processes that torchrun starts again go on by themselves."""
        self.dataset = dataset or open_dataset(
            config.data, image_size=config.image_size, on_bad_image=config.on_bad_image
        )
        train, held_out = split_training_images(self.dataset, config)
        self.splits = [split for split in (train, held_out, self.dataset.test) if split is not None]
        self.source = train_source(self.dataset, train, config, self.device)
        self.stream = training_stream(self.source, config)
        self.cache = cache_settings(config)
        if config.cache.images and not train.resident:
            self.source.crops.stored = ImageColumn(self.source, config.cache, views_shown(config.views, config.epochs))
        self.validation = self._evaluated(held_out) if held_out is not None else None
        self.capture = pick_capture(config.capture, self.device)
        self.plan = Plan()
        self.costs: Costs | None = None
        """What the cache's plan was made from, if it was made from measurements."""
        torch.manual_seed(config.seed)
        self.paired = self._place(paired) if paired is not None else self._pair(teacher, student)
        self._check_ranks()
        self.paired.precision = self._precision()
        self.paired.fuses_norms = pick_fusion(config.fuse_norms, self.device)
        self.image_dtype = torch.float32
        if self.paired.precision.dtype != torch.float32:
            self.image_dtype = pick_image_dtype(self.paired, self._first_images()[:TRIAL_IMAGES])

    def run(self, *, progress: bool = True) -> RunResult:
        """Train (or resume), evaluate on the test split once, and write all results to `config.out`."""
        out = Path(self.config.out)
        if self.ranks.from_first(lambda: not self.resume and self.checkpoint.exists()):
            raise ConfigError(f"{out} already holds a run. Pass --resume to continue it, or another --out to keep it.")
        engine = self._engine()
        if self.resume:
            engine.resume()
        resumed_at = engine.progress.step if self.resume else None
        speaks = Recorder(out, progress=progress, resume_step=resumed_at) if self.ranks.is_first else NoRecorder()
        with speaks as recorder, self._closing(engine):
            engine.recorder = recorder
            if resumed_at is None:
                self._emit_start(recorder, engine)
            engine.train()
            result = self._finish(engine, out)
            recorder.emit("run_end", step=engine.progress.step, **asdict(result))
        if self.ranks.is_first:
            write_results(out / "results.json", [asdict(result)])
            write_run_report(out)
        self.ranks.finish()
        return result

    def build_cache(self) -> dict[str, int]:
        """Store what the plan keeps, for all images and views of the run; rows by column. Trains nothing."""
        engine = self._engine()
        with self._closing(engine):
            wanted, source = self.plan.kept.keys(), self.source.part(self.ranks.rank, self.ranks.size)
            if not wanted:
                return {}
            for view in range(views_shown(self.source.views, engine.stages[-1].last / self.source.steps_per_epoch)):
                for batch in engine.teacher.ahead(source.whole_view(view), wanted):
                    engine.teacher.outputs(wanted, engine.to_device(batch.images), batch)
            self.ranks.finish()
            engine.teacher.fill(wanted)
            return engine.teacher.report()["rows"]

    @contextlib.contextmanager
    def _closing(self, engine: Engine) -> Iterator[None]:
        """Let go of the cache's files at the end, whatever it is."""
        try:
            yield
        finally:
            engine.teacher.close()
            if self.source.crops is not None and self.source.crops.stored is not None:
                self.source.crops.stored.close()

    def _finish(self, engine: Engine, out: Path) -> RunResult:
        student = engine.composed_student()
        metrics = evaluate(
            student, self._evaluated(self.dataset.test).batches(), engine.to_device, self.ranks.all_reduce
        )
        engine.emit_evaluation("test", metrics)
        skipped = [[str(path), reason] for split in self.splits for path, reason in split.skipped]
        if skipped:
            engine.recorder.emit("skipped_images", step=engine.progress.step, images=skipped)
        if isinstance(engine.teacher, CachedTeacher):
            engine.recorder.emit("cache", step=engine.progress.step, **engine.teacher.report())
        if self.ranks.is_first:
            metadata = {"student": self.config.student, "classes": self.dataset.classes, "data": self.config.data}
            save_tensors(out / "student.safetensors", student.state_dict(), metadata)
        steps, seconds = engine.progress.step, engine.progress.seconds
        return RunResult(
            method=self.config.method,
            seed=self.config.seed,
            accuracy=metrics.accuracy,
            top5=metrics.top5,
            epochs=steps / self.source.steps_per_epoch,
            steps=steps,
            images_per_second=steps * self.config.batch_size / seconds,
            wall_seconds=seconds,
            data_wait_share=engine.progress.wait_seconds / seconds,
            skipped_images=len(skipped),
        )

    def _engine(self) -> Engine:
        config, per_epoch = self.config, self.source.steps_per_epoch
        total_steps = max(round(config.epochs * per_epoch), 1)
        stages = config.stages or method_stages(config.method, len(self.paired), config.recipe, config.optimizer)
        objectives, planned = objectives_of(config), plan_stages(stages, len(self.paired), total_steps, per_epoch)
        planner = Planner(self.paired, self.source, objectives, planned, self.cache, self.device)
        teacher = self._teacher(planner)
        return Engine(
            paired=self.paired,
            teacher=teacher,
            plan=self.plan,
            objectives=objectives,
            stages=planned,
            source=self.source,
            stream=self.stream,
            validation=self.validation,
            recorder=None,
            checkpoint=self.checkpoint,
            identity=identity(config) | self._facts(),
            device=self.device,
            bn_batches=bn_batches(config, self.source),
            evaluate_every=max(round(config.evaluate_every * per_epoch), 1) if config.evaluate_every else 0,
            checkpoint_every=config.checkpoint_every or per_epoch,
            log_every=config.log_every,
            capture=self.capture,
            fall_back=config.capture == "auto",
            ema=config.ema,
            parts=config.accumulate,
            sync_norms=config.sync_norms,
            ranks=self.ranks,
            layouts=self._layouts(planned, objectives, teacher),
            image_dtype=self.image_dtype,
        )

    def _layouts(self, planned: list[PlannedStage], objectives: Objectives, teacher: Teacher) -> list[Layout]:
        """How the ranks divide each stage. A run that goes on with as many ranks goes on with its own."""
        if self.ranks.size == 1:
            return []
        size, kept = self._metadata.get("layouts", [0, []]) if self.resume else (0, [])
        if size == self.ranks.size:
            return [Layout.from_plain(values) for values in kept]
        return measured_layouts(
            self.paired,
            objectives,
            [stage.stage.groups for stage in planned],
            self.source,
            self.ranks,
            columns=teacher.columns if isinstance(teacher, CachedTeacher) else {},
            relays=isinstance(teacher, Relay),
            axis=self.config.parallel,
            accumulate=self.config.accumulate,
        )

    def _evaluated(self, split: Split) -> EvalSource:
        """This rank's share of the images."""
        return eval_source(self.dataset, split, self.config, self.ranks.rank, self.ranks.size)

    @cached_property
    def _metadata(self) -> dict:
        """Of the checkpoint that the run goes on from."""
        return self.ranks.from_first(lambda: load_metadata(self.checkpoint))

    def _check_ranks(self) -> None:
        """Refuse to start with ranks that would train something else."""
        if self.ranks.size == 1:
            return
        settings = {name: value for name, value in asdict(self.config).items() if name not in ("out", "workers")}
        data = {"images": image_fingerprint(self.source), "versions": versions()}
        self.ranks.check_alike({**settings, **self._facts(), **data})

    def _teacher(self, planner: Planner) -> Teacher:
        """A resumed run goes on with the plan that it began with."""
        examples = planner.examples() if self.cache.keeps_rows else {}
        if self.resume:
            self.plan = Plan.from_plain(self._metadata.get("plan", []))
        else:
            self.plan, self.costs = self.ranks.from_first(lambda: planner.plan(examples))
        live = LiveTeacher(self.paired, self.capture, fall_back=self.config.capture == "auto")
        if not self.plan.kept:
            return Relay(self.paired, live)
        columns = planner.columns.open(self.plan, examples or planner.examples())
        return CachedTeacher(self.paired, columns, self.source.split.total, self.device, live)

    def _precision(self) -> Precision:
        """A resumed run goes on in the precision that it began with."""
        name = self.config.precision
        if name == "auto" and self.resume:
            name = self._metadata.get("precision", name)

        def trial(precision: Precision) -> float:
            images = self._first_images()
            with watched(lambda: f"a trial of {precision.name}", self.config.batch_size):
                return seconds_per_pass(precision, self.paired.student, images)

        return self.ranks.from_first(lambda: pick_precision(name, self.device, trial))

    def _first_images(self) -> Tensor:
        return next(self.source.batches(0, 1)).images.to(self.device)

    def _facts(self) -> dict:
        """What decides the numbers beside the settings: a resumed run must meet the same teacher and images."""
        teacher = self.paired.teacher if self.config.method != "ce" else None
        return {
            "teacher_fingerprint": fingerprint(teacher) if teacher is not None else None,
            "source": self.stream.loader.name,
            "training_images": self.source.steps_per_epoch * self.config.batch_size,
            "classes": self.dataset.classes,
            "compiled": self.capture == "compile",
            "fused_norms": self.paired.fuses_norms,
            "inexact": [
                [output, kept.codec] for output, kept in sorted(self.plan.kept.items()) if kept.codec != "fp32"
            ],
        }

    def _pair(self, teacher: nn.Module | None, student: nn.Module | None) -> PairedBlocks:
        config, classes = self.config, len(self.dataset.classes)
        calibration = [batch.images for batch in self.source.batches(0, CALIBRATION_BATCHES)]
        example = torch.cat(calibration)
        size = example.shape[-1]
        if student is None:
            student = models.build(config.student, classes, size)
            if config.student_weights:
                models.load_weights(student, config.student_weights)
        if config.method == "ce":
            return PairedBlocks.without_teacher(placed(student, self.device))
        if teacher is None:
            teacher = self._named_teacher(classes, size)
        teacher, student = placed(teacher, self.device).eval(), placed(student, self.device)
        example = example.to(self.device)
        with torch.no_grad():
            width = teacher(example[:2]).shape[-1]
        if width != classes:
            raise ModelError(
                f"The teacher predicts {width} classes, but the data set {self.dataset.name} has {classes}. "
                "Use a teacher trained on these classes."
            )
        paired = pair_blocks(teacher, student, example, config.cuts or "auto", config.blocks, bridge=config.bridge)
        return self._with_head(paired)

    def _place(self, paired: PairedBlocks) -> PairedBlocks:
        modules = [paired.teacher, paired.student, *paired.teacher_blocks, *paired.student_blocks, *paired.bridges]
        for module in modules:
            if module is not None:
                placed(module, self.device)
        nn.ModuleList([paired.teacher, *paired.teacher_blocks]).eval()
        return self._with_head(paired)

    def _with_head(self, paired: PairedBlocks) -> PairedBlocks:
        if self.config.copy_classifier and not self.config.student_weights:
            copy_head(paired)
        return paired

    def _named_teacher(self, classes: int, size: int) -> nn.Module:
        if not self.config.teacher_weights:
            raise ConfigError(
                f"The method {self.config.method} needs a trained teacher, but no --teacher-weights were given. Train "
                f"one with `stablekd distill --method ce --student {self.config.teacher} --data {self.config.data} "
                "--out teacher` and pass --teacher-weights teacher/student.safetensors."
            )
        teacher = models.build(self.config.teacher, classes, size)
        models.load_weights(teacher, self.config.teacher_weights)
        return teacher

    def _emit_start(self, recorder: Recorder, engine: Engine) -> None:
        recorder.emit(
            "run_start",
            step=0,
            method=self.config.method,
            seed=self.config.seed,
            total_steps=engine.stages[-1].last,
            steps_per_epoch=self.source.steps_per_epoch,
            config=asdict(self.config),
            machine=machine(),
            versions=versions(),
            capture=self.capture,
            precision=dataclasses.asdict(self.paired.precision),
            fused_norms=self.paired.fuses_norms,
            images=str(self.image_dtype).removeprefix("torch."),
            source=asdict(self.stream.loader),
        )
        if self.costs is not None:
            predicted = [predict(self.costs, plan).seconds for plan in (self.plan, Plan())]
            recorder.emit(
                "cache_plan",
                step=0,
                outputs=decisions(self.costs, self.plan),
                predicted_seconds=predicted[0],
                predicted_seconds_relay=predicted[1],
            )


def distill(config: DistillConfig | None = None, *, progress: bool = True, **settings) -> RunResult:
    """Distil a student and write it, with its results, to the output directory.

    `settings` are fields of `DistillConfig`, given instead of a config; `teacher` and `student` may be modules,
    `dataset` a `Dataset`, and `paired` the result of `pair_blocks`:

        distill(data="cifar10", teacher="resnet56", teacher_weights="teacher.safetensors",
                student="resnet20", epochs=8, out="runs/first")
    """
    parts = {name: settings.pop(name, None) for name in ("dataset", "paired")}
    for name in ("teacher", "student"):
        if isinstance(settings.get(name), nn.Module):
            parts[name] = settings[name]
            settings[name] = type(settings[name]).__name__
    if config is not None and settings:
        raise ConfigError(f"Both a config and the settings {sorted(settings)} were given; give one of the two.")
    fields = [field.name for field in dataclasses.fields(DistillConfig)]
    for name in settings:
        if name not in fields:
            raise ConfigError(f"There is no setting {name!r}{nearest(name, fields)}.")
    return Distiller(config or DistillConfig(**settings), **parts).run(progress=progress)
