"""What may happen to cropped images before they are normalised: colour jitter, and mixing with another image.

All of it is drawn from the view's own key, done on the device that the images lie on, and rounded to uint8, so that an
altered image has a name, `(seed, sample, view)`, like any other.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from stablekd_fast.data.augmentation import Augmentation
from stablekd_fast.data.views import Stream, below, counter_hash, unit

_GRAY = (0.299, 0.587, 0.114)
"""How much red, green and blue add to a pixel's brightness (ITU-R BT.601)."""


def draw_partners(seed: int, sample_ids: np.ndarray, view: int, count: int) -> np.ndarray:
    """Draw for each sample the position of its partner among `count` training images, int64 `[N]`."""
    return below(counter_hash(Stream.PARTNER, seed, sample_ids, view), count)


def draw_mix_weights(seed: int, sample_ids: np.ndarray, view: int, alpha: float) -> np.ndarray:
    """Draw the weight of each sample beside its partner, float64 `[N]`: Beta(alpha, alpha), uniform for alpha = 1."""
    uniform = unit(counter_hash(Stream.MIX_WEIGHT, seed, sample_ids, view))
    if alpha == 1.0:
        return uniform
    from scipy.special import betaincinv  # comes with scikit-learn

    return betaincinv(alpha, alpha, uniform)


def mixed(
    images: Tensor, partners: Tensor, augmentation: Augmentation, seed: int, sample_ids: np.ndarray, view: int
) -> tuple[Tensor, np.ndarray]:
    """Mix images uint8 `[N, H, W, C]` with their partners as `augmentation` says.

    Returns the mixed images, and the weight of each image's own label, float64 `[N]`.
    """
    weights = draw_mix_weights(seed, sample_ids, view, augmentation.mix_alpha)
    if augmentation.mix == "mixup":
        return mixed_up(images, partners, weights), weights
    height, width = images.shape[1:3]
    return cut_mixed(images, partners, cut_boxes(seed, sample_ids, view, weights, height, width))


def mixed_up(images: Tensor, partners: Tensor, weights: np.ndarray) -> Tensor:
    """Mix by Mixup (arXiv 1710.09412): the weighted mean of two images uint8 `[N, H, W, C]`, rounded."""
    weight = torch.from_numpy(weights).to(images.device, torch.float32)[:, None, None, None]
    return (images * weight + partners * (1 - weight)).round().to(torch.uint8)


def cut_boxes(seed: int, sample_ids: np.ndarray, view: int, weights: np.ndarray, height: int, width: int) -> np.ndarray:
    """Draw the boxes int64 `[N, 4]` (top, left, bottom, right) that CutMix (arXiv 1905.04899) gives to the partner.

    A box covers 1 - weight of the area, round a random middle; what would lie outside the image is cut off.
    """
    row = below(counter_hash(Stream.CUT_ROW, seed, sample_ids, view), height)
    column = below(counter_hash(Stream.CUT_COLUMN, seed, sample_ids, view), width)
    half_height, half_width = (np.rint(side * np.sqrt(1 - weights) / 2).astype(np.int64) for side in (height, width))
    corners = (row - half_height, column - half_width, row + half_height, column + half_width)
    return np.stack([corner.clip(0, side) for corner, side in zip(corners, (height, width, height, width))], axis=1)


def cut_mixed(images: Tensor, partners: Tensor, boxes: np.ndarray) -> tuple[Tensor, np.ndarray]:
    """Put the partner's pixels inside the boxes, and leave the image's own outside.

    Returns the mixed images, and the fraction of each that is its own in the end, float64 `[N]`.
    """
    height, width = images.shape[1:3]
    top, left, bottom, right = (torch.from_numpy(side).to(images.device)[:, None] for side in boxes.T)
    rows, columns = (torch.arange(side, device=images.device)[None] for side in (height, width))
    inside = ((rows >= top) & (rows < bottom))[:, :, None] & ((columns >= left) & (columns < right))[:, None]
    own = 1 - (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / (height * width)
    return torch.where(inside[..., None], partners, images), own


def jittered(images: Tensor, seed: int, sample_ids: np.ndarray, view: int, strength: float) -> Tensor:
    """Multiply brightness, contrast and saturation of uint8 `[N, H, W, 3]` by a factor each, drawn from 1 - strength to
    1 + strength."""

    def factor(stream: Stream) -> Tensor:
        drawn = 1 + strength * (2 * unit(counter_hash(stream, seed, sample_ids, view)) - 1)
        return torch.from_numpy(drawn).to(images.device, torch.float32)[:, None, None, None]

    gray = torch.tensor(_GRAY, device=images.device)
    pixels = (images * factor(Stream.BRIGHTNESS)).clamp(0, 255)
    middle = (pixels * gray).sum(3, keepdim=True).mean((1, 2), keepdim=True)
    pixels = middle.lerp(pixels, factor(Stream.CONTRAST)).clamp(0, 255)
    pixels = (pixels * gray).sum(3, keepdim=True).lerp(pixels, factor(Stream.SATURATION))
    return pixels.clamp(0, 255).round().to(torch.uint8)
