"""Readable arithmetic of the pad, crop and flip augmentation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from stablekd_fast.kernels._checks import accumulator
from stablekd_fast.kernels.augment_batch._bounds import check_bounds


def augment_batch(
    images: Tensor,
    rows: Tensor,
    offsets: Tensor,
    flips: Tensor,
    padding: int,
    mean: list[float],
    std: list[float],
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    """See `stablekd_fast.kernels.augment_batch`."""
    check_bounds(images, rows, offsets, padding)
    _, height, width, channels = images.shape
    padded = pad(images[rows], (0, 0, padding, padding, padding, padding))
    down = torch.arange(height, device=images.device)
    across = torch.arange(width, device=images.device).expand(len(rows), width)
    across = torch.where(flips[:, None], across.flip(1), across)
    samples = torch.arange(len(rows), device=images.device)
    crops = padded[
        samples[:, None, None],
        (offsets[:, :1] + down)[:, :, None],
        (offsets[:, 1:] + across)[:, None, :],
    ]
    wide = accumulator(dtype)
    centre, spread = (torch.tensor(values, dtype=wide, device=images.device) for values in (mean, std))
    # A Python 255 would be a multiplication by 1/255 on some devices, which rounds differently.
    white = torch.tensor(255, dtype=wide, device=images.device)
    normalised = (crops.to(wide) / white - centre) / spread
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty(
        (len(rows), channels, height, width), dtype=dtype, device=images.device, memory_format=memory_format
    )
    return out.copy_(normalised.permute(0, 3, 1, 2))
