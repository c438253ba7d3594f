"""The teacher of a run before it is cut: its weights, what they say of it, and how its images are made."""

from __future__ import annotations

import dataclasses
import warnings

from torch import Tensor, nn

from stablekd_fast import models
from stablekd_fast.blocks.check import check_runs
from stablekd_fast.config import DistillConfig
from stablekd_fast.data import Dataset
from stablekd_fast.errors import ConfigError, ModelError
from stablekd_fast.execution.memory import placed
from stablekd_fast.models.black_box import BlackBox
from stablekd_fast.models.headless import named_network
from stablekd_fast.models.inputs import Adapted, ImageInput, input_of
from stablekd_fast.models.weights import card_of
from stablekd_fast.models.wrappers import unwrapped


def _card(config: DistillConfig) -> dict:
    """What the teacher's weights say of it. Raises ConfigError for weights that are asked for twice."""
    found = models.published(config.teacher)
    if found is None:
        return card_of(config.teacher_weights)
    if config.teacher_weights:
        raise ConfigError(
            f"teacher_weights={config.teacher_weights} was given, but teacher={config.teacher} asks for published "
            "weights; give one of the two."
        )
    return found.card


def checked_card(config: DistillConfig, dataset: Dataset) -> dict:
    """What the teacher's weights, a file or published ones, say of it. Raises ModelError if its classes are those of
    the data set in another order, where the teacher has a classifier."""
    card, named = _card(config), config.teacher_weights or config.teacher
    theirs = card.get("classes") if config.head == "classifier" else None
    if theirs and theirs != dataset.classes:
        if sorted(theirs) == sorted(dataset.classes):
            place = next(k for k, pair in enumerate(zip(theirs, dataset.classes)) if pair[0] != pair[1])
            raise ModelError(
                f"{named} has the classes of {dataset.name} in another order: its class {place} is "
                f"{theirs[place]!r}, the data set's {dataset.classes[place]!r}. Use a teacher that was trained on this "
                "order, or name the folders so that they sort alike."
            )
        shown = [", ".join(map(str, names[:3])) for names in (theirs, dataset.classes)]
        warnings.warn(
            f"The teacher's weights name other classes ({shown[0]}, ...) than {dataset.name} does ({shown[1]}, ...); "
            "they are taken for each other in this order.",
            stacklevel=1,
        )
    return card


def teacher_input(config: DistillConfig, dataset: Dataset, teacher: nn.Module, card: dict, size: int) -> Adapted | None:
    """What gives the teacher its own images; None where they are the student's, of `size` pixels."""
    given = ImageInput(dataset.mean, dataset.std, dataset.name, size)
    wanted = input_of(teacher, card, config.teacher_weights or config.teacher) or given
    if config.teacher_mean is not None or config.teacher_std is not None:
        mean, std = config.teacher_mean or dataset.mean, config.teacher_std or dataset.std
        if len(mean) != 3 or len(std) != 3 or not all(value > 0 for value in std):
            raise ConfigError(
                f"teacher_mean={list(mean)} and teacher_std={list(std)} were given; three numbers each are needed, the "
                "standard deviations greater than 0."
            )
        wanted = ImageInput((mean[0], mean[1], mean[2]), (std[0], std[1], std[2]), "the settings", wanted.size)
    wanted = dataclasses.replace(wanted, size=config.teacher_image_size or wanted.size or size)
    if dataclasses.replace(wanted, source=given.source) == given:
        return None
    warnings.warn(
        f"The teacher's images are made by mean {list(wanted.mean)}, std {list(wanted.std)} and {wanted.size} pixels "
        f"({wanted.source}), the student's by {list(given.mean)}, {list(given.std)} and {given.size} pixels "
        f"({given.source}).",
        stacklevel=1,
    )
    return Adapted(given, wanted)


def with_classes_of(config: DistillConfig, dataset: Dataset, module: nn.Module | None, example: Tensor) -> Dataset:
    """The data set with the classes of the teacher, `module` or by name, where no image says which there are.

    `example`: images `[N, 3, H, W]` on the device. Raises ConfigError without a teacher, ModelError for one whose
    classes cannot be told.
    """
    if isinstance(module, BlackBox):
        count = module.classes
    elif module is not None:
        module = placed(unwrapped(module), example.device).eval()
        own = teacher_input(config, dataset, module, {}, example.shape[-1])
        count = check_runs(module, example if own is None else own.to(example.device)(example)).shape[1]
    elif names := _card(config).get("classes"):
        return dataclasses.replace(dataset, classes=list(names))
    elif found := models.published(config.teacher):
        count = found.classes
    else:
        size = config.teacher_image_size or dataset.model_size(example)
        count = models.classes_in(models.build(config.teacher, 1000, size), _weights_of(config))
    if not count:
        raise ModelError(
            f"{config.teacher} has no classifier, and the images have no labels, so that nothing says which classes "
            "there are. Use a teacher that tells classes apart."
        )
    return dataclasses.replace(dataset, classes=[str(number) for number in range(count)])


def named_teacher(config: DistillConfig, classes: int, size: int) -> nn.Module:
    """The teacher that the settings name, with its weights, for images of `size` pixels.

    Raises ConfigError without weights, ModelError for weights that do not fit or tell other classes apart.
    """
    found = models.published(config.teacher)
    if config.head != "classifier":
        return named_network(config.teacher, classes, size, config.head, None if found else _weights_of(config))
    if found is not None:
        if found.classes != classes or not classes:
            own = f"tells {found.classes} classes apart" if found.classes else "has no classifier"
            raise ModelError(
                f"{config.teacher} {own}, but the data set has {classes} classes. Use a teacher that was trained on "
                "these classes, or images without labels, whose classes are the teacher's."
            )
        return found.build(classes, size)
    weights = _weights_of(config)
    teacher = models.build(config.teacher, classes, size)
    models.load_weights(teacher, weights)
    return teacher


def _weights_of(config: DistillConfig) -> str:
    """The file of the teacher's weights. Raises ConfigError if none was given."""
    if not config.teacher_weights:
        raise ConfigError(
            f"The method {config.method} needs a trained teacher, but no --teacher-weights were given. Train "
            f"one with `stablekd distill --method ce --student {config.teacher} --data {config.data} "
            "--out teacher` and pass --teacher-weights teacher/student.safetensors, or ask for published ones by name, "
            "for instance --teacher torchvision/resnet34@DEFAULT."
        )
    return config.teacher_weights
