"""How training images vary and how images are scaled: what a data set brings, and what settings change of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from stablekd_fast.errors import ConfigError

Interpolation = Literal["bilinear", "bicubic"]

MOST_MAGNITUDE = 30


@dataclass(frozen=True)
class Augmentation:
    """How training images vary. Which variant an image gets is decided by `views`.

    "pad_crop": zero-pad by `padding` pixels on each side, cut the original size out. "resized_crop": cut a random box
    out, of `scale` (least and most) of the area and of width / height in `ratio`, and scale it to `size` x `size` by
    `interpolation`. `flip` mirrors one half of the images. `jitter` is the strength of colour jitter (0.4: brightness,
    contrast and saturation between 60% and 140%). `operations` RandAugment operations of a `magnitude` of 30 follow.
    "mixup" and "cutmix" mix each image with another one of the training images, and their labels alike, by weights
    drawn from Beta(`mix_alpha`, `mix_alpha`). `erasing` is the share of images of which a box is replaced by the mean.
    `scaled_decode` decodes large JPEGs at a half, a quarter or an eighth of their size where the box is still large
    enough: faster, but to other pixels, hence to another view.
    """

    kind: Literal["pad_crop", "resized_crop"]
    flip: bool
    padding: int = 0
    size: int | None = None
    jitter: float = 0.0
    mix: Literal["mixup", "cutmix"] | None = None
    mix_alpha: float = 1.0
    scaled_decode: bool = False
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: Interpolation = "bilinear"
    operations: int = 0
    magnitude: int = 9
    erasing: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ("pad_crop", "resized_crop"):
            raise ConfigError(f"Augmentation {self.kind!r} does not exist; use 'pad_crop' or 'resized_crop'.")
        if self.padding < 0:
            raise ConfigError(f"Padding must be 0 pixels or more, got {self.padding}.")
        if self.kind == "resized_crop" and (self.size is None or self.size < 1):
            raise ConfigError(f"A resized crop needs its size in pixels, got {self.size}.")
        if not 0 <= self.jitter <= 1:
            raise ConfigError(f"The strength of colour jitter lies between 0 and 1, got {self.jitter}.")
        if self.mix not in (None, "mixup", "cutmix"):
            raise ConfigError(f"Images are mixed by 'mixup' or 'cutmix', got {self.mix!r}.")
        if not self.mix_alpha > 0:
            raise ConfigError(f"mix_alpha must be greater than 0, got {self.mix_alpha}.")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ConfigError(
                f"crop.scale is the least and the most of the area, above 0 and up to 1; got {list(self.scale)}."
            )
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ConfigError(f"crop.ratio is the least and the most width / height, above 0; got {list(self.ratio)}.")
        if self.interpolation not in get_args(Interpolation):
            raise ConfigError(f"interpolation={self.interpolation!r} was given; choose bilinear or bicubic.")
        if not 0 <= self.operations <= 10:
            raise ConfigError(f"augment.operations={self.operations} was given; it lies between 0 and 10.")
        if not 0 <= self.magnitude <= MOST_MAGNITUDE:
            raise ConfigError(f"augment.magnitude={self.magnitude} was given; it lies between 0 and {MOST_MAGNITUDE}.")
        if not 0 <= self.erasing <= 1:
            raise ConfigError(f"augment.erasing={self.erasing} was given; it is a share of the images, from 0 to 1.")

    @property
    def alters(self) -> bool:
        """Whether pixels change after an image was cropped and mirrored."""
        return bool(self.jitter or self.mix or self.operations or self.erasing)


@dataclass
class CropSettings:
    """How training images are cropped; None leaves what suits the data set."""

    padding: int | None = None
    """Small images: pixels of black on each side, out of which a random part of the original size is cut."""
    scale: list[float] | None = None
    """Large images: the least and the most of the area that a random box covers; None: 0.08 and 1."""
    ratio: list[float] | None = None
    """Large images: the least and the most width / height of a random box; None: 3/4 and 4/3."""


@dataclass
class AugmentSettings:
    """Random operations on training images, drawn from each view's own generator."""

    operations: int = 0
    """How many operations of RandAugment (arXiv 1909.13719) an image goes through; 2 is usual."""
    magnitude: int = 9
    """How strong they are, from 0 to 30."""
    erasing: float = 0.0
    """The share of images of which a random box is replaced by the mean (arXiv 1708.04896)."""


@dataclass
class EvaluationSettings:
    """How large images are made ready for evaluation."""

    resize: int | None = None
    """Pixels that the short side is scaled to; None takes 256/224 of the crop."""
    crop: int | None = None
    """The side in pixels of what is cut out of the middle; None takes the size of training."""


def altered(
    augmentation: Augmentation, crop: CropSettings, augment: AugmentSettings, flip: bool | None, **others: object
) -> Augmentation:
    """Return a data set's augmentation with what settings change of it. `others` are fields by name.

    Raises ConfigError where a setting does not suit the kind of images.
    """
    pads, boxes = crop.padding is not None, crop.scale is not None or crop.ratio is not None
    if (pads and augmentation.kind != "pad_crop") or (boxes and augmentation.kind != "resized_crop"):
        have, needed = ("large", "crop.scale and crop.ratio") if pads else ("small", "crop.padding")
        raise ConfigError(
            f"{'crop.padding' if pads else 'crop.scale or crop.ratio'} was given, but these images are {have} ones, "
            f"which are cropped by {needed}."
        )
    changes = dict(others)
    if flip is not None:
        changes["flip"] = flip
    if pads:
        changes["padding"] = crop.padding
    for name in ("scale", "ratio"):
        if getattr(crop, name) is not None:
            changes[name] = _two(f"crop.{name}", getattr(crop, name))
    for field in dataclasses.fields(AugmentSettings):  # what is left at its default overrides nothing
        value = getattr(augment, field.name)
        if value != field.default:
            changes[field.name] = value
    return dataclasses.replace(augmentation, **changes)


def _two(name: str, values: Sequence[float]) -> tuple[float, float]:
    if len(values) != 2:
        raise ConfigError(f"{name}={list(values)} was given; two numbers are needed, the least and the most.")
    return float(values[0]), float(values[1])
