"""RandAugment and random erasing on views: what is done to an image is drawn from the view's own key.

RandAugment: Cubuk et al., arXiv 1909.13719, with the fourteen operations and the strengths of torchvision's
`RandAugment`, applied by torchvision's functions. Random erasing: Zhong et al., arXiv 1708.04896.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from stablekd_fast.data.augmentation import MOST_MAGNITUDE, Augmentation
from stablekd_fast.data.threads import ordered_map
from stablekd_fast.data.views import Stream, below, counter_hash, unit

_IMAGES_PER_TASK = 16

_ERASED_AREA, _ERASED_RATIO = (0.02, 1 / 3), (0.3, 10 / 3)


def _sheared(image: Tensor, x: float, y: float) -> Tensor:
    degrees = [math.degrees(math.atan(x)), math.degrees(math.atan(y))]
    return F.affine(image, 0.0, [0, 0], 1.0, degrees, InterpolationMode.NEAREST, center=[0, 0])


def _moved(image: Tensor, x: float, y: float) -> Tensor:
    return F.affine(image, 0.0, [int(x), int(y)], 1.0, [0.0, 0.0], InterpolationMode.NEAREST)


Operation = Callable[[Tensor, float], Tensor]
"""Takes an image uint8 `[3, H, W]` and a strength from -1 to 1."""

OPERATIONS: tuple[Operation, ...] = (
    lambda image, s: image,
    lambda image, s: _sheared(image, 0.3 * s, 0.0),
    lambda image, s: _sheared(image, 0.0, 0.3 * s),
    lambda image, s: _moved(image, 150 / 331 * image.shape[2] * s, 0),
    lambda image, s: _moved(image, 0, 150 / 331 * image.shape[1] * s),
    lambda image, s: F.rotate(image, 30 * s, InterpolationMode.NEAREST),
    lambda image, s: F.adjust_brightness(image, 1 + 0.9 * s),
    lambda image, s: F.adjust_saturation(image, 1 + 0.9 * s),
    lambda image, s: F.adjust_contrast(image, 1 + 0.9 * s),
    lambda image, s: F.adjust_sharpness(image, 1 + 0.9 * s),
    lambda image, s: F.posterize(image, 8 - round(4 * abs(s))),
    lambda image, s: F.solarize(image, 255 * (1 - abs(s))),
    lambda image, s: F.autocontrast(image),
    lambda image, s: F.equalize(image),
)
"""In the order of torchvision's `RandAugment`; the place of an operation is part of a view's name."""


def operated(
    images: Tensor, augmentation: Augmentation, seed: int, sample_ids: np.ndarray, view: int, workers: int = 0
) -> Tensor:
    """Put views uint8 `[N, H, W, 3]` through `augmentation.operations` operations each, drawn with equal odds.

    The images are divided among `workers` threads, which decide nothing.
    """
    strength = augmentation.magnitude / MOST_MAGNITUDE
    numbers = np.arange(augmentation.operations)[:, None]
    which = below(counter_hash(Stream.OPERATION, seed, sample_ids, view, numbers), len(OPERATIONS))
    negative = below(counter_hash(Stream.OPERATION_SIGN, seed, sample_ids, view, numbers), 2)
    changed = images.permute(0, 3, 1, 2).contiguous()

    def work(first: int) -> None:
        for place in range(first, min(first + _IMAGES_PER_TASK, len(changed))):
            for chosen, sign in zip(which[:, place].tolist(), negative[:, place].tolist()):
                changed[place] = OPERATIONS[chosen](changed[place], -strength if sign else strength)

    for _ in ordered_map(work, range(0, len(changed), _IMAGES_PER_TASK), workers=workers, ahead=2 * workers):
        pass
    return changed.permute(0, 2, 3, 1)


def erased(
    images: Tensor, augmentation: Augmentation, mean: Tensor, seed: int, sample_ids: np.ndarray, view: int
) -> Tensor:
    """Replace a random box by `mean` `[3]` (0 to 255), in a share `augmentation.erasing` of views uint8 `[N, H, W, 3]`.

    The box covers 2% to 33% of the area, its height / width lies between 0.3 and 3.3 (uniform in the logarithm).
    """

    def draw(stream: Stream) -> np.ndarray:
        return unit(counter_hash(stream, seed, sample_ids, view))

    height, width = images.shape[1:3]
    area = (_ERASED_AREA[0] + (_ERASED_AREA[1] - _ERASED_AREA[0]) * draw(Stream.ERASED_AREA)) * height * width
    low, high = np.log(_ERASED_RATIO)
    ratio = np.exp(low + (high - low) * draw(Stream.ERASED_RATIO))
    box_height = np.rint(np.sqrt(area * ratio)).astype(np.int64).clip(1, height)
    box_width = np.rint(np.sqrt(area / ratio)).astype(np.int64).clip(1, width)
    top = below(counter_hash(Stream.ERASED_TOP, seed, sample_ids, view), height - box_height + 1)
    left = below(counter_hash(Stream.ERASED_LEFT, seed, sample_ids, view), width - box_width + 1)
    hit = torch.from_numpy(draw(Stream.ERASED) < augmentation.erasing)
    rows, columns = torch.arange(height)[None], torch.arange(width)[None]
    top, left, bottom, right = (
        torch.from_numpy(side)[:, None] for side in (top, left, top + box_height, left + box_width)
    )
    inside = ((rows >= top) & (rows < bottom))[:, :, None] & ((columns >= left) & (columns < right))[:, None]
    inside = (inside & hit[:, None, None]).to(images.device)
    return torch.where(inside[..., None], mean.round().to(images), images)
