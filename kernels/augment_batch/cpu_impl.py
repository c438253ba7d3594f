"""`augment_batch` by the C++ core."""

from __future__ import annotations

import torch
from torch import Tensor

from stablekd_fast.kernels._checks import FLOATS
from stablekd_fast.kernels._cpu import GRAIN, TYPES, threads
from stablekd_fast.kernels._native import core
from stablekd_fast.kernels.augment_batch import reference
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
    """Equal to the reference to the last bit. The core computes in float32; other types stay with the reference."""
    if dtype not in FLOATS:
        return reference.augment_batch(images, rows, offsets, flips, padding, mean, std, dtype, channels_last)
    images, rows, offsets, flips = (tensor.contiguous() for tensor in (images, rows, offsets, flips))
    _, height, width, channels = images.shape
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty((len(rows), channels, height, width), dtype=dtype, memory_format=memory_format)
    done = core.augment_batch(
        images.data_ptr(),
        len(images),
        rows.data_ptr(),
        offsets.data_ptr(),
        flips.data_ptr(),
        out.data_ptr(),
        TYPES[dtype],
        len(rows),
        height,
        width,
        channels,
        padding,
        mean,
        std,
        channels_last,
        threads(out.numel(), GRAIN),
    )
    if not done:
        check_bounds(images, rows, offsets, padding)
    return out
