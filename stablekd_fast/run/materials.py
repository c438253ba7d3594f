"""What a run works with: device, ranks, images, and the pair of networks cut into blocks."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from stablekd_fast.blocks import PairedBlocks, pair_blocks, pair_reused, pick_fusion, serve
from stablekd_fast.blocks.check import check_runs, check_separate
from stablekd_fast.blocks.pair import copy_head
from stablekd_fast.cache.image_column import ImageColumn
from stablekd_fast.cache.settings import CacheSettings
from stablekd_fast.config import DistillConfig, objectives_of, synthesis_of
from stablekd_fast.data import Dataset, EvalSource, Split, StreamSource, TrainSource, open_dataset
from stablekd_fast.distributed import Ranks, join
from stablekd_fast.engine.checkpoint import load_metadata
from stablekd_fast.errors import ConfigError, CutError, ModelError
from stablekd_fast.execution.capture import pick_capture
from stablekd_fast.execution.memory import placed, watched
from stablekd_fast.execution.precision import Precision, pick_precision, seconds_per_pass
from stablekd_fast.models.black_box import BlackBox
from stablekd_fast.models.headless import named_network
from stablekd_fast.models.wrappers import unwrapped
from stablekd_fast.objectives import Objectives
from stablekd_fast.planning.costs import views_shown
from stablekd_fast.report import versions
from stablekd_fast.run.builders import (
    cache_settings,
    eval_source,
    normalised_by_settings,
    pick_device,
    pick_image_dtype,
    split_training_images,
    train_source,
    training_stream,
)
from stablekd_fast.run.synthesised import bank_source, check_synthesis, held_out_images
from stablekd_fast.run.teachers import checked_card, named_teacher, teacher_input, with_classes_of
from stablekd_fast.run.unlabelled import judged, without_labels

CALIBRATION_BATCHES = 2
"""Training batches to which bridges are fitted."""

TRIAL_IMAGES = 8
"""Images on which it is tried whether networks round them first of all."""


@dataclass(frozen=True)
class Given:
    """What a caller gives in place of names in the settings."""

    teacher: nn.Module | None = None
    """With its weights."""
    student: nn.Module | None = None
    dataset: Dataset | None = None
    paired: PairedBlocks | None = None
    """Blocks that `pair_blocks` made, for models that need block lists by hand."""


@dataclass(frozen=True)
class Images:
    """The images of a run, and what makes batches of them."""

    dataset: Dataset
    splits: list[Split]
    """The splits that the run reads: for training, held out (if there are any), for the test."""
    source: TrainSource
    stream: TrainSource | StreamSource
    """What training takes its batches from: `source`, unless another is asked for."""
    validation: EvalSource | None
    test: Split
    """The test split, of which images that cannot be read are left out."""
    cache: CacheSettings

    def first(self, device: torch.device) -> Tensor:
        """The images of the first training batch `[N, C, H, W]`, on `device`."""
        return next(self.source.batches(0, 1)).pixels.to(device)

    def facts(self) -> dict:
        """What the images are, for the run's log."""
        dataset = self.dataset
        return {
            "name": dataset.name,
            "classes": len(dataset.classes),
            "labelled": self.source.split.labelled,
            "training_images": len(self.source.split),
            "held_out": len(self.validation.split) if self.validation is not None else 0,
            "test_images": dataset.test.total,
            "decoding_threads": None if self.source.split.resident else self.source.workers,
            "left_out": dataset.left_out,
            "notes": dataset.notes,
        }


@dataclass(frozen=True)
class Materials:
    """All that a run has before it is decided how it trains."""

    config: DistillConfig
    device: torch.device
    ranks: Ranks
    resumed: dict | None
    """The metadata of the checkpoint that the run goes on from; None for a new run."""
    images: Images
    capture: str
    paired: PairedBlocks
    image_dtype: torch.dtype
    """The type of the images that steps read."""

    @property
    def objectives(self) -> Objectives:
        """The losses of the run, which take no labels where the images have none."""
        objectives = objectives_of(self.config)
        return dataclasses.replace(objectives, use_labels=objectives.use_labels and self.source.split.labelled)

    @property
    def source(self) -> TrainSource:
        """Named views of the training images."""
        return self.images.source


def gather(config: DistillConfig, given: Given) -> Materials:
    """Meet the other ranks, open the images, seed torch, cut the pair, and choose its precision.

    Raises ConfigError, DataError, ModelError or CutError if something is missing or does not fit; CheckpointError if a
    run is to go on whose checkpoint cannot be read.
    """
    device = pick_device(config.device)
    ranks = join(device, config.timeout)
    ranks.check_alike(_settings(config))
    resumed = _resumed(config, ranks)
    images = _open_images(config, given.dataset, device, ranks)
    has_classifier = config.head == "classifier"
    if has_classifier and not images.source.split.labelled:
        config = without_labels(config)
    if has_classifier and not images.dataset.classes:
        module = given.paired.teacher if given.paired is not None else given.teacher
        dataset = with_classes_of(config, images.dataset, module, images.first(device))
        images = dataclasses.replace(images, dataset=dataset)
    capture = pick_capture(config.capture, device)
    torch.manual_seed(config.seed)
    if config.reuses_classifier and given.paired is not None:
        raise ConfigError(
            f"paired was given, but the method {config.method} makes the student and its blocks itself; give teacher "
            "and student."
        )
    paired = _place(given.paired, device) if given.paired is not None else _pair(config, given, images, device)
    paired = dataclasses.replace(paired, head=config.head)
    if config.head == "none" and not paired.last_is_idle:
        raise CutError(
            f"head=none leaves the student's last block, behind {paired.cuts[-1].student}, without a loss, but it has "
            "weights to train. Give a further cut behind them (--cuts), or use head=embedding."
        )
    if config.copy_classifier and not config.student_weights and given.student is None:
        copy_head(paired)
    precision = _precision(config, resumed, ranks, paired.student, images, device)
    paired = dataclasses.replace(paired, precision=precision, fuses_norms=_fuses(config, device))
    if config.has_teacher and not isinstance(paired.teacher, BlackBox):
        paired = serve(paired, images.first(device), config.fold_teacher)
    image_dtype = torch.float32
    if precision.dtype != torch.float32 and images.dataset.popularity is None:  # numbers of users are not rounded
        image_dtype = pick_image_dtype(paired, images.first(device)[:TRIAL_IMAGES])
    if has_classifier and images.validation is not None:
        images = dataclasses.replace(images, validation=judged(images.validation, paired))
    return Materials(config, device, ranks, resumed, images, capture, paired, image_dtype)


def _fuses(config: DistillConfig, device: torch.device) -> bool:
    """Whether the student's norms are fused. The fused operator cannot be differentiated twice."""
    auxiliary = objectives_of(config).auxiliary
    if auxiliary is None or not auxiliary.kind.reads_input_gradient:
        return pick_fusion(config.fuse_norms, device)
    if config.fuse_norms == "on":
        raise ConfigError(f"{auxiliary.name} differentiates twice, which fused norms cannot; use fuse_norms=off.")
    return False


def _settings(config: DistillConfig) -> dict:
    """What ranks must be started with alike: all settings but where they write and how they decode; all versions."""
    settings = {name: value for name, value in asdict(config).items() if name not in ("out", "workers")}
    return {**settings, "versions": versions()}


def _resumed(config: DistillConfig, ranks: Ranks) -> dict | None:
    """Processes that torchrun starts again go on by themselves."""
    checkpoint = Path(config.out) / "checkpoint.safetensors"
    if not (config.resume or ranks.from_first(lambda: ranks.restarted and checkpoint.exists())):
        return None
    return ranks.from_first(lambda: load_metadata(checkpoint))


def _open_images(config: DistillConfig, dataset: Dataset | None, device: torch.device, ranks: Ranks) -> Images:
    if dataset is None:
        dataset = open_dataset(config.data, image_size=config.image_size, on_bad_image=config.on_bad_image)
    elif config.image_size is not None and dataset.test.size != config.image_size:
        raise ConfigError(
            f"image_size={config.image_size} was given, but the data set was opened with images of "
            f"{dataset.test.size} pixels; give the image size to open_dataset."
        )
    dataset = normalised_by_settings(dataset, config)
    if synthesis := synthesis_of(config):
        check_synthesis(config, synthesis, ranks.size)
        source = stream = bank_source(config, synthesis, dataset, device)
        held_out, cache = held_out_images(dataset, config), config.cache
    else:
        train, held_out = split_training_images(dataset, config)
        source = train_source(dataset, train, config, device)
        stream = training_stream(source, config)
        cache = cache_settings(config)
        if config.cache.images and not train.resident:
            source.store_images(ImageColumn(source, config.cache, views_shown(config.views, config.epochs)))
    validation = (
        eval_source(dataset, held_out, config, ranks.rank, ranks.size, device) if held_out is not None else None
    )
    test = dataset.test.skipping()
    splits = [split for split in (source.split, held_out, test) if split is not None]
    return Images(dataset, splits, source, stream, validation, test, cache)


def _pair(config: DistillConfig, given: Given, images: Images, device: torch.device) -> PairedBlocks:
    """Build what the settings name, load the weights, and cut."""
    classes, headless = len(images.dataset.classes), config.head != "classifier"
    example = torch.cat([batch.pixels for batch in images.source.batches(0, CALIBRATION_BATCHES)])
    size = images.dataset.model_size(example)
    student = unwrapped(given.student) if given.student is not None else None
    if student is None:
        student = named_network(config.student, classes, size, config.head, config.student_weights)
    student, example = placed(student, device), example.to(device)
    _check_output(student, example, None if headless else classes, images.dataset.name, "student")
    part = config.batch_size // config.accumulate
    if part == 1:  # norms over the batch alone find nothing to average
        check_runs(student, example[:1], training=True)
    if not config.has_teacher:
        return PairedBlocks.without_teacher(student)
    card = {} if given.teacher is not None else checked_card(config, images.dataset)
    teacher = given.teacher
    if teacher is None:
        teacher = named_teacher(config, classes, config.teacher_image_size or card.get("image_size") or size)
    teacher = placed(unwrapped(teacher), device).eval()
    own = teacher_input(config, images.dataset, teacher, card, size)
    own = own if own is None else own.to(device)
    shown = example if own is None else own(example)
    _check_output(teacher, shown, None if headless else classes, images.dataset.name, "teacher")
    objectives = objectives_of(config)
    if isinstance(teacher, BlackBox):
        _check_black_box(config, objectives)
        return PairedBlocks.uncut(teacher, student, own)
    if config.reuses_classifier:
        return pair_reused(teacher, student, example, own)
    bridge = "none" if objectives.takes_any_width and not config.feeds_blocks else config.bridge
    try:
        paired = pair_blocks(
            teacher, student, example, config.cuts or "auto", config.blocks, bridge=bridge, teacher_input=own
        )
    except CutError as error:
        if objectives.needs_cuts or config.feeds_blocks or config.cuts is not None or config.blocks is not None:
            raise
        check_separate(teacher, student)
        warnings.warn(f"The networks are not cut, which {config.method} does not need: {error}", stacklevel=1)
        return PairedBlocks.uncut(teacher, student, own)
    return paired


def _check_black_box(config: DistillConfig, objectives: Objectives) -> None:
    """Raise ConfigError for a method that needs more of the teacher than its answers."""
    auxiliary = objectives.auxiliary
    steep = synthesis_of(config) is not None or (auxiliary is not None and auxiliary.kind.reads_input_gradient)
    headless = config.head != "classifier"
    asked = config.feeds_blocks or config.cuts is not None or config.blocks is not None
    if steep or headless or objectives.needs_cuts or asked:
        needed = "gradients" if steep else "embedding" if headless else "outputs at cuts"
        raise ConfigError(
            f"The method {config.method} needs the teacher's {needed}, as it is set, but the teacher is a black box, "
            "which only answers; use kd, dkd or mekd, without --cuts and --blocks."
        )


def _check_output(model: nn.Module, example: Tensor, classes: int | None, dataset: str, role: str) -> None:
    """Raise ModelError if a network does not compute the images, or does not tell so many classes apart; None: it has
    no classifier."""
    output = check_runs(model, example)
    if classes is None:
        return
    if output.dim() != 2:
        raise ModelError(
            f"The {role} gives {list(output.shape[1:])} for an image, but one number for each class is needed. Give it "
            "a classifier, or set head=embedding."
        )
    width = output.shape[1]
    if width != classes:
        raise ModelError(
            f"The {role} predicts {width} classes, but the data set {dataset} has {classes}. Use a {role} "
            f"{'trained on' if role == 'teacher' else 'made for'} these classes."
        )


def _place(paired: PairedBlocks, device: torch.device) -> PairedBlocks:
    modules = [paired.teacher, paired.student, *paired.teacher_blocks, *paired.student_blocks, *paired.bridges]
    for module in modules:
        if module is not None:
            placed(module, device)
    nn.ModuleList([paired.teacher, *paired.teacher_blocks]).eval()
    return paired


def _precision(
    config: DistillConfig, resumed: dict | None, ranks: Ranks, student: nn.Module, images: Images, device: torch.device
) -> Precision:
    """A resumed run goes on in the precision that it began with."""
    name = config.precision
    if name == "auto" and resumed is not None:
        name = resumed.get("precision", name)

    def trial(precision: Precision) -> float:
        batch = images.first(device)
        with watched(lambda: f"a trial of {precision.name}", config.batch_size):
            return seconds_per_pass(precision, student, batch)

    return ranks.from_first(lambda: pick_precision(name, device, trial))
