"""One distillation run: put together, trained, evaluated, written down. The Python side of `stablekd distill`."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from stablekd_fast.blocks import PairedBlocks
from stablekd_fast.blocks.modes import sources_forgotten
from stablekd_fast.cache.columns import Plan
from stablekd_fast.config import DistillConfig, exported_name
from stablekd_fast.data import Dataset, EvalSource, TrainSource
from stablekd_fast.distributed import Ranks
from stablekd_fast.engine.alignment import Alignment
from stablekd_fast.engine.checkpoint import RunState, resume_run, save_tensors
from stablekd_fast.engine.evaluate import Metrics
from stablekd_fast.engine.loop import Engine
from stablekd_fast.engine.parts import Execution, Intervals, Parts
from stablekd_fast.engine.ranking import Ranking
from stablekd_fast.errors import ConfigError, DataError, TrainingError, first_line, nearest, printable
from stablekd_fast.execution.process import current_device, deterministic
from stablekd_fast.execution.signals import Signals, watched_signals
from stablekd_fast.files.owned import only_run_in
from stablekd_fast.models.weights import CARD_FORMAT
from stablekd_fast.planning.costs import views_shown
from stablekd_fast.planning.rows import decisions, predict
from stablekd_fast.report import NoRecorder, Recorder, machine, versions, write_results, write_run_report
from stablekd_fast.run.builders import bn_batches, eval_source, pick_device
from stablekd_fast.run.decisions import Decisions, decide
from stablekd_fast.run.first_look import look_at_teacher
from stablekd_fast.run.materials import Given, Materials, gather
from stablekd_fast.run.unlabelled import judged
from stablekd_fast.teacher.cached import CachedTeacher


@dataclass(frozen=True)
class RunResult:
    """What one run reached: `accuracy` and `top5` (0 to 1) of the exported student on the test split, or, where it has
    no classifier, `cosine` and `relative_error` there (see `Alignment`)."""

    method: str
    seed: int
    accuracy: float | None
    top5: float | None
    epochs: float
    steps: int
    images_per_second: float
    wall_seconds: float
    """Training and waiting for data, evaluation left out; summed over resumes."""
    data_wait_share: float = 0.0
    """The fraction of `wall_seconds` that was spent on waiting for the next batch."""
    skipped_images: int = 0
    """Unreadable images left out (with `on_bad_image="skip"`); the event log names them."""
    ranking: Ranking | None = None
    """How well items are ranked for users; `accuracy` is then recall, and `top5` NDCG."""
    truth: str = "labels"
    """What the student is held against: the `labels` of the test images, or the `teacher` where they have none; then
    `accuracy` and `top5` say how often the teacher's first class is the student's first, or among its first five."""
    cosine: float | None = None
    relative_error: float | None = None

    def plain(self) -> dict[str, Any]:
        """As JSON types; of the two measures the one that the run has."""
        lacks = ("cosine", "relative_error") if self.cosine is None else ("accuracy", "top5", "ranking", "truth")
        return {name: value for name, value in asdict(self).items() if name not in lacks}

    @property
    def reached(self) -> str:
        """The measure in words."""
        if self.cosine is not None:
            return f"cosine {self.cosine:.4f}"
        return f"{'accuracy' if self.truth == 'labels' else 'agreement with the teacher'} {self.accuracy:.2%}"


STUDENT_FILE = "student.safetensors"

_IN_CARDS = {"accuracy": "agreement", "top5": "agreement_top5", "cosine": "cosine", "relative_error": "relative_error"}
"""What an exported student's card says of it, and under which name where the teacher stood in for labels."""


class Distiller:
    """One distillation run.

    Making one does nothing yet. `run` puts the parts together in three steps, each of which gives something that does
    not change any more: `materials` (device, ranks, images, the pair cut into blocks), `decided` (stages, what is kept
    of the teacher, who trains what) and `parts`, which the engine trains. Whoever asks for one of them earlier has it
    made earlier.

    Args:
        config: the settings.
        teacher, student: modules to use instead of the names in the settings. The teacher comes with its weights.
        dataset: a data set to use instead of the path in the settings.
        paired: blocks made by `pair_blocks` to use instead of cutting here, for models that need block lists by hand.
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
        self.given = Given(teacher, student, dataset, paired)
        self.checkpoint = Path(config.out) / "checkpoint.safetensors"

    @cached_property
    def materials(self) -> Materials:
        """What the run works with. Made once; raises ConfigError, DataError, ModelError or CutError if it does not
        fit."""
        with self._process():
            return gather(self.config, self.given)

    @cached_property
    def decided(self) -> Decisions:
        """What was decided for the run, alike on all ranks. Made once; raises ConfigError or CacheError."""
        materials = self.materials
        with self._process():
            return decide(materials)

    @cached_property
    def parts(self) -> Parts:
        """What the engine trains."""
        config, materials, decided = self.config, self.materials, self.decided
        per_epoch = materials.source.steps_per_epoch
        return Parts(
            paired=materials.paired,
            teacher=decided.teacher,
            plan=decided.plan,
            objectives=decided.objectives,
            stages=decided.stages,
            source=materials.source,
            stream=materials.images.stream,
            validation=materials.images.validation,
            device=materials.device,
            ranks=materials.ranks,
            layouts=decided.layouts,
            execution=Execution(
                capture=materials.capture,
                fall_back=config.capture == "auto",
                image_dtype=materials.image_dtype,
                ema=config.ema,
                micro_batches=config.accumulate,
                sync_norms=config.sync_norms,
            ),
            intervals=Intervals(
                evaluate=max(round(config.evaluate_every * per_epoch), 1) if config.evaluate_every else 0,
                checkpoint=config.checkpoint_every or per_epoch,
                log=config.log_every,
            ),
            bn_batches=bn_batches(config, materials.source),
            checkpoint=self.checkpoint,
            identity=decided.identity,
            synthesised=decided.synthesised,
        )

    @contextlib.contextmanager
    def _process(self) -> Iterator[None]:
        """A context in which the run works: its GPU is the current one, and what was set for determinism is in
        force."""
        device = pick_device(self.config.device)
        with current_device(device), deterministic(device, self.config.deterministic):
            yield

    @property
    def ranks(self) -> Ranks:
        """The processes of the run."""
        return self.materials.ranks

    @property
    def paired(self) -> PairedBlocks:
        """The pair, cut into blocks."""
        return self.materials.paired

    @property
    def source(self) -> TrainSource:
        """Views of the training images."""
        return self.materials.source

    def run(self, *, progress: bool = True) -> RunResult:
        """Train (or resume), evaluate on the test split once, and write all results to `config.out`.

        Raises ConfigError, DataError, ModelError or CutError if the parts do not fit, CheckpointError or CacheError for
        files of another run, TrainingError if training cannot go on. Of runs in one directory at a time all but the
        first are refused. Interrupted where SIGINT, SIGTERM or SIGHUP asks for an end: then the step under way is
        finished and all is saved, to be resumed; a second signal ends the process at once.
        """
        follows = int(os.environ.get("RANK", 0)) > 0  # its first process holds the directory
        alone = contextlib.nullcontext() if follows else only_run_in(Path(self.config.out))
        with watched_signals() as signals, alone, sources_forgotten():
            try:
                return self._run(progress, signals)
            except Exception as error:
                if not signals.explain(error):
                    raise
                raise signals.ended() from error

    def _run(self, progress: bool, signals: Signals) -> RunResult:
        out, ranks, resumes = Path(self.config.out), self.ranks, self.materials.resumed is not None
        if ranks.from_first(lambda: not resumes and self.checkpoint.exists()):
            raise ConfigError(f"{out} already holds a run. Pass --resume to continue it, or another --out to keep it.")
        parts = self.parts  # all is decided and opened before anything is written
        state = resume_run(parts) if resumes else RunState()
        resumed_at = state.progress.step if resumes else None
        recorder = Recorder(out, progress=progress, resume_step=resumed_at) if ranks.is_first else NoRecorder()
        with self._process(), recorder, parts:
            self._keep_digests(out / "images.log", resumes)
            if not resumes:
                self._emit_start(recorder)
                look_at_teacher(self.materials, self.given, recorder)
            engine = Engine(parts, state, recorder, signals)
            with signals.awaited(ranks.can_name):
                engine.train()
            signals.remedy = "The student is trained; the same command with --resume evaluates and reports it."
            if isinstance(parts.teacher, CachedTeacher):
                parts.teacher.seal()
            result = self._finish(engine, out)
            with _a_line_not_a_run("the event log"):
                recorder.emit("run_end", step=state.progress.step, **result.plain())
        if ranks.is_first:
            with _a_line_not_a_run(f"{out / 'results.json'} ({result.reached})"):
                write_results(out / "results.json", [result.plain()])
            with _a_line_not_a_run("the report"):
                write_run_report(out)
        ranks.finish()
        return result

    def build_cache(self) -> dict[str, int]:
        """Store what the plan keeps, for all images and views of the run; rows by column. Trains nothing."""
        with watched_signals() as signals:
            signals.remedy = "What is stored stays; the same command goes on from there."
            return self._fill_cache()

    def _fill_cache(self) -> dict[str, int]:
        parts, teacher = self.parts, self.parts.teacher
        with self._process(), parts:
            wanted, source = parts.plan.kept.keys(), parts.source.part(self.ranks.rank, self.ranks.size)
            if not isinstance(teacher, CachedTeacher):  # nothing is kept
                return {}
            for view in range(views_shown(source.views, parts.stages[-1].last / source.steps_per_epoch)):
                for batch in teacher.ahead(source.whole_view(view), wanted):
                    images = None if batch.images is None else batch.images.to(parts.device, non_blocking=True)
                    teacher.outputs(wanted, images, batch)
            teacher.seal()
            self.ranks.finish()
            teacher.fill(wanted)
            return teacher.report()["rows"]

    def _finish(self, engine: Engine, out: Path) -> RunResult:
        """Export the composed student, and evaluate it on the test split: whatever that meets, the student is there."""
        images, progress, student = self.materials.images, engine.progress, engine.composed_student()
        engine.check_composed(student)
        self._export(out, student)
        test = eval_source(
            images.dataset, images.test, self.config, self.ranks.rank, self.ranks.size, engine.parts.device
        )
        if self.config.head == "classifier":
            test = judged(test, self.materials.paired)
        metrics = self._tested(engine, student, test, out)
        found = metrics.event()
        named = {name: name if test.truth == "labels" else other for name, other in _IN_CARDS.items()}
        self._export(out, student, **{named[name]: found[name] for name in named if name in found})
        skipped = [[str(path), reason] for split in images.splits for path, reason in split.skipped]
        with _a_line_not_a_run("the event log"):
            engine.emit_evaluation("test", metrics, test.truth)
            if skipped:
                engine.recorder.emit("skipped_images", step=progress.step, images=skipped)
            if isinstance(self.parts.teacher, CachedTeacher):
                engine.recorder.emit("cache", step=progress.step, **self.parts.teacher.report())
        return RunResult(
            method=self.config.method,
            seed=self.config.seed,
            accuracy=found.get("accuracy"),
            top5=found.get("top5"),
            epochs=progress.step / images.source.steps_per_epoch,
            steps=progress.step,
            images_per_second=progress.step * self.config.batch_size / progress.seconds,
            wall_seconds=progress.seconds,
            data_wait_share=progress.wait_seconds / progress.seconds,
            skipped_images=len(skipped),
            ranking=metrics.ranking if isinstance(metrics, Metrics) else None,
            truth=test.truth,
            cosine=found.get("cosine"),
            relative_error=found.get("relative_error"),
        )

    def _tested(self, engine: Engine, student: nn.Module, test: EvalSource, out: Path) -> Metrics | Alignment:
        """Evaluate on the test split; images of it that cannot be read are left out, and that is said."""
        images = self.materials.images
        try:
            metrics = engine.measured(student, test.batches())
        except DataError as error:
            raise DataError(f"{error} The student is trained and lies in {out / STUDENT_FILE}.") from error
        if not metrics.finite:
            where = f"the student, which lies in {out / STUDENT_FILE}, should not be used"
            raise TrainingError(f"What is measured on test images is not finite: {where}. Lower --optimizer.lr.")
        left_out = images.test.skipped
        if left_out and self.config.on_bad_image == "stop":
            path, reason = left_out[0]
            warnings.warn(
                f"{len(left_out)} test images could not be read and are left out, the first: {printable(path)} "
                f"({reason}). What was reached is that of {metrics.images} images.",
                stacklevel=1,
            )
        return metrics

    def _export(self, out: Path, student: nn.Module, **reached: float) -> None:
        """Write the student and its card; `reached` is what it was measured to reach."""
        config, dataset = self.config, self.materials.images.dataset
        if not self.ranks.is_first:
            return
        card = {
            "format": CARD_FORMAT,
            "student": exported_name(config.method, config.student, config.teacher),
            "head": config.head,
            "classes": dataset.classes,
            "data": config.data,
            "images": self.source.split.identity(),
            "mean": list(dataset.mean),
            "std": list(dataset.std),
            "image_size": config.image_size,
            "evaluation": asdict(config.evaluation),
            "interpolation": config.interpolation,
            **reached,
        }
        save_tensors(out / STUDENT_FILE, student.state_dict(), card)

    def _keep_digests(self, log: Path, resumes: bool) -> None:
        """Go on with the log of what the training images hold; a new run begins its own."""
        if not resumes:
            self.ranks.from_first(lambda: log.unlink(missing_ok=True))
        self.source.split.keep_digests(log)

    def _emit_start(self, recorder: Recorder | NoRecorder) -> None:
        """Log the settings, the place, and what was decided."""
        materials, decided = self.materials, self.decided
        recorder.emit(
            "run_start",
            step=0,
            method=self.config.method,
            seed=self.config.seed,
            total_steps=decided.stages[-1].last,
            steps_per_epoch=materials.source.steps_per_epoch,
            config=asdict(self.config),
            machine=machine(),
            versions=versions(),
            capture=materials.capture,
            precision=asdict(materials.paired.precision),
            fused_norms=materials.paired.fuses_norms,
            folded_teacher=materials.paired.folded,
            images=str(materials.image_dtype).removeprefix("torch."),
            source=asdict(materials.images.stream.choice),
        )
        recorder.emit("data", step=0, **materials.images.facts())
        if decided.costs is not None:
            predicted = [predict(decided.costs, plan).seconds for plan in (decided.plan, Plan())]
            times = {"predicted_seconds": predicted[0], "predicted_seconds_relay": predicted[1]}
            recorder.emit("cache_plan", step=0, outputs=decisions(decided.costs, decided.plan), **times)


@contextlib.contextmanager
def _a_line_not_a_run(what: str) -> Iterator[None]:
    """Go on where something that is written after training cannot be: the student is there, and this says so."""
    try:
        yield
    except Exception as error:  # whatever a report meets: no list is complete
        warnings.warn(f"The student is saved, but not {what}: {first_line(error)}.", RuntimeWarning, stacklevel=3)


def distill(config: DistillConfig | None = None, *, progress: bool = True, **settings: Any) -> RunResult:
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
    for name in (name for name in settings if name not in fields):
        raise ConfigError(f"There is no setting {name!r}{nearest(name, fields)}.")
    return Distiller(config or DistillConfig(**settings), **parts).run(progress=progress)
