"""`augment_batch` by the C++ core."""

from __future__ import annotations

import torch
from torch import Tensor

from stablekd_fast.kernels._native import core
from stablekd_fast.kernels.augment_batch import reference
from stablekd_fast.kernels.augment_batch._bounds import check_bounds

# Below this many elements per thread, waking a thread costs more than it saves.
_GRAIN = 32768


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
    """Equal to the reference to the last bit. The core computes in float32; float64 stays with the reference."""
    if dtype == torch.float64:
        return reference.augment_batch(images, rows, offsets, flips, padding, mean, std, dtype, channels_last)
    check_bounds(images, rows, offsets, padding)
    images, rows, offsets, flips = (tensor.contiguous() for tensor in (images, rows, offsets, flips))
    _, height, width, channels = images.shape
    layout = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty((len(rows), channels, height, width), dtype=torch.float32, memory_format=layout)
    core.augment_batch(
        images=images.data_ptr(),
        rows=rows.data_ptr(),
        offsets=offsets.data_ptr(),
        flips=flips.data_ptr(),
        out=out.data_ptr(),
        batch=len(rows),
        height=height,
        width=width,
        channels=channels,
        padding=padding,
        mean=mean,
        std=std,
        channels_last=channels_last,
        threads=max(1, min(torch.get_num_threads(), out.numel() // _GRAIN)),
    )
    return out.to(dtype)
