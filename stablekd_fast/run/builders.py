"""Parts of a run made from its settings: device, images to train on and to hold out, sources of batches."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import warnings

import torch
from torch import Tensor, nn

from stablekd_fast.blocks import PairedBlocks
from stablekd_fast.blocks.check import check_runs
from stablekd_fast.blocks.layout import Layout, Resampling, layout_of
from stablekd_fast.blocks.modes import untouched
from stablekd_fast.cache import CacheSettings
from stablekd_fast.config import DistillConfig
from stablekd_fast.data import (
    STREAM,
    Augmentation,
    Dataset,
    EvalSource,
    Split,
    StreamSource,
    TrainSource,
    UserEvalSource,
    UserSource,
)
from stablekd_fast.data.augmentation import altered
from stablekd_fast.data.dataset import Channels
from stablekd_fast.errors import ConfigError, DataError, first_line
from stablekd_fast.objectives import Facts
from stablekd_fast.objectives.embedding import channel_axis_of
from stablekd_fast.report.machine import usable_cores


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one; `cuda` is the one that torchrun means for this process, else the current
    one; `cuda:N` the one of this number.

    Raises ConfigError for a device that is not there, and for one GPU that several processes of a host would share.
    """
    asked = name
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    elif name.startswith("cuda:") and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
        raise ConfigError(
            f"device={asked} was given to each of {os.environ['LOCAL_WORLD_SIZE']} processes of this host, but each "
            "needs a GPU of its own; give --device cuda, which takes as many as there are processes."
        )
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is not None and device.index >= (count := torch.cuda.device_count()):
            raise RuntimeError(f"this machine shows {count} GPUs, numbered from 0")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error)
        raise ConfigError(
            f"device {asked!r} cannot be used ({reason}); choose cpu, cuda, cuda:N or auto, or start fewer processes."
        ) from error
    return device


def normalised_by_settings(dataset: Dataset, config: DistillConfig) -> Dataset:
    """The data set, with the mean and the standard deviation that the settings give."""
    mean, std = config.mean or dataset.mean, config.std or dataset.std
    if len(mean) != 3 or len(std) != 3 or not all(value > 0 for value in std):
        raise ConfigError(
            f"mean={list(mean)} and std={list(std)} were given; three numbers each are needed, the standard deviations "
            "greater than 0."
        )
    return dataclasses.replace(dataset, mean=(mean[0], mean[1], mean[2]), std=(std[0], std[1], std[2]))


def split_training_images(dataset: Dataset, config: DistillConfig) -> tuple[Split, Split | None]:
    """The images to train on and those held out for the live metric (None if there are none).

    Those are the data set's own validation images where it has some, else a part of the training images, which is taken
    first, so that it is the same for every subset.
    """
    train, held_out = dataset.train, dataset.validation if config.validation else None
    count = held_out_count(config, train)
    if count and held_out is None:
        train, held_out = train.holdout(count, config.subset_seed)
    if config.subset is not None:
        size = config.subset if config.subset <= 1 else int(config.subset)
        train = train.subset(size, config.subset_seed)
    return train, held_out


def held_out_count(config: DistillConfig, train: Split) -> int:
    """How many of the training images the settings hold out."""
    return round(config.validation * len(train)) if config.validation < 1 else round(config.validation)


def train_source(dataset: Dataset, split: Split, config: DistillConfig, device: torch.device) -> TrainSource:
    """Named views of the training images; also of a run that trains on others (see `training_stream`)."""
    # What is left at its default does not override a data set that brings its own augmentation.
    names = ("jitter", "mix", "mix_alpha", "scaled_decode", "interpolation")
    chosen = {name: getattr(config, name) for name in names}
    asked_for = {name: value for name, value in chosen.items() if value != getattr(DistillConfig, name)}
    if config.batch_size > len(split):
        held = dataset.train.total - len(split) if config.subset is None else 0
        said = f" ({held} of {dataset.train.total} are held out or left out)" if held else ""
        raise DataError(
            f"A batch of {config.batch_size} does not fit {len(split)} training images{said}; give a batch size of at "
            f"most {len(split)}, or more images."
        )
    kind = TrainSource if dataset.popularity is None else UserSource
    return kind(
        split,
        altered(dataset.augmentation, config.crop, config.augment, config.flip, **asked_for),
        dataset.mean,
        dataset.std,
        batch_size=config.batch_size,
        seed=config.seed,
        views=config.views,
        view_seed=config.view_seed,
        classes=len(dataset.classes),
        source="auto" if config.source == STREAM else config.source,
        workers=decoding_threads(config.workers, torch.device(device)),
        prefetch=config.prefetch,
        device=device,
    )


def decoding_threads(asked: int | None, device: torch.device) -> int:
    """The threads that decode: so many as are asked for, or one for each core that is this process's. Processes that
    torchrun starts on one machine share its cores, those that train on processors as `join` has divided them."""
    if asked is not None:
        return asked
    together = 1 if device.type == "cpu" else int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, (usable_cores() or 1) // together)


def training_stream(source: TrainSource, config: DistillConfig) -> TrainSource | StreamSource:
    """What training takes its batches from: `source` itself, or DALI's own stream of its images where that is asked
    for.

    Raises ConfigError if something else is asked for that needs an exact order or named views.
    """
    if config.source != STREAM:
        return source
    needing = {
        "views": source.views is not None,
        "mix": source.augmentation.mix is not None,
        "augment": source.augmentation.operations > 0 or source.augmentation.erasing > 0,
        "crop": (source.augmentation.scale, source.augmentation.ratio) != (Augmentation.scale, Augmentation.ratio),
        "interpolation": source.augmentation.interpolation != Augmentation.interpolation,
        "scaled_decode": source.augmentation.scaled_decode,
        "on_bad_image=skip": config.on_bad_image == "skip",
        "cache.plan=all": config.cache.plan == "all",
        "cache.images": config.cache.images,
    }
    given = [name for name, asked in needing.items() if asked]
    if given:
        raise ConfigError(
            f"source={STREAM} was given together with {', '.join(given)}: that needs an exact order or views that "
            "have names, and DALI's own readers and crops give neither. Leave it out, or use source=dali."
        )
    return StreamSource(source)


def cache_settings(config: DistillConfig) -> CacheSettings:
    """Return the settings in force: rows of images without names could not be found again."""
    if config.source != STREAM or not config.cache.keeps_rows:
        return config.cache
    reason = (
        f"cache.plan=auto keeps nothing: the views of source={STREAM} have no names by which rows could be found again."
    )
    warnings.warn(reason, RuntimeWarning, stacklevel=1)
    return dataclasses.replace(config.cache, plan="none")


def pick_image_dtype(paired: PairedBlocks, images: Tensor) -> torch.dtype:
    """What training images are handed out in: the type of autocast, if both networks round images to it before all
    else, as the trial on `images` `[N, 3, H, W]` shows; no number changes then. Otherwise float32."""
    dtype = paired.precision.dtype
    with paired.precision.applied(images.device):
        for block in dict.fromkeys((paired.teacher_blocks[0], paired.student_blocks[0])):
            outputs = []
            for given in (images, images.to(dtype)):
                with untouched(block):
                    outputs.append(block(given))
            if outputs[0].dtype != outputs[1].dtype or not torch.equal(*outputs):
                return torch.float32
    return dtype


def bn_batches(config: DistillConfig, source: TrainSource) -> int:
    """Batches for batch-norm statistics, at most an epoch's."""
    return min(math.ceil(config.bn_images / source.batch_size), source.steps_per_epoch)


def eval_source(
    dataset: Dataset,
    split: Split,
    config: DistillConfig,
    rank: int = 0,
    ranks: int = 1,
    device: torch.device | str = "cpu",
) -> EvalSource:
    """Batches of unchanged images of a split, on each rank its own ones, normalised on a device."""
    kind = EvalSource if dataset.popularity is None else UserEvalSource
    return kind(
        split,
        dataset.mean,
        dataset.std,
        batch_size=config.batch_size * 2,
        image_size=config.evaluation.crop,
        resize=config.evaluation.resize,
        interpolation=config.interpolation,
        workers=decoding_threads(config.workers, torch.device(device)),
        rank=rank,
        ranks=ranks,
        device=device,
    )


def auxiliary_facts(
    paired: PairedBlocks,
    classes: int,
    samples: int,
    batch_size: int,
    size: tuple[int, int],
    device: torch.device,
    *,
    outputs: tuple[Layout, Layout] | None = None,
    has_teacher: bool = True,
    popularity: Tensor | None = None,
    mean: Channels = (0.0, 0.0, 0.0),
    std: Channels = (1.0, 1.0, 1.0),
) -> Facts:
    """What an auxiliary loss is made from. `samples`: sample ids are below it; `batch_size`: images of a process;
    `outputs`: how the student's and the teacher's last output lie, where they are no logits."""
    students = [cut.student_shape for cut in paired.cuts]
    teachers = [
        cut.teacher_shape if paired.bridge_after(k) is None else cut.student_shape for k, cut in enumerate(paired.cuts)
    ]
    return Facts(
        classes=classes,
        samples=samples,
        batch_size=batch_size,
        size=size,
        student_shapes=[*students, outputs[0].shape if outputs else (classes,)],
        teacher_shapes=[*teachers, outputs[1].shape if outputs else (classes,)],
        channel_axes=[cut.student_channel_axis for cut in paired.cuts],
        device=device,
        teacher=nn.Sequential(*paired.teacher_blocks) if has_teacher else None,
        mean=mean,
        std=std,
        places=_resampling(*outputs) if outputs else None,
        popularity=popularity,
    )


def embedding_layouts(paired: PairedBlocks, images: Tensor) -> tuple[Layout, Layout]:
    """How the student's and the teacher's embedding of images `[N, 3, H, W]` lie.

    Raises ConfigError where one cannot be compared with the other.
    """
    last, size = len(paired.cuts), tuple(images.shape[2:])
    outputs = check_runs(paired.student, images), paired.teacher_outputs(images[:2], [last])[last]
    shapes = [tuple(output.shape[1:]) for output in outputs]
    own, theirs = (layout_of(shape, channel_axis_of(shape), size) for shape in shapes)
    vectors = {len(shape) == 1 for shape in shapes}
    if len(vectors) > 1 or not own.fits(theirs):
        raise ConfigError(
            f"The student's embedding is {list(own.shape)} per image and the teacher's {list(theirs.shape)}, which "
            "have no places in common. Have both give one vector, or both tokens or maps on grids of the image's "
            "proportions."
        )
    return own, theirs


def _resampling(own: Layout, theirs: Layout) -> Resampling | None:
    return None if own.places == theirs.places else Resampling(theirs, own)


def fingerprint(model: nn.Module) -> str:
    """A digest of all weights and buffers, by name and value."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
