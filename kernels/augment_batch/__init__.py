"""Pad, crop, flip and normalise a batch picked from resident images, in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stablekd_fast.kernels._checks import OperandError, describe
from stablekd_fast.kernels._registry import define, serve_cpu, serve_cuda
from stablekd_fast.kernels.augment_batch import cpu_impl, reference


def augment_batch(
    images: Tensor,
    rows: Tensor,
    offsets: Tensor,
    flips: Tensor,
    *,
    padding: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
    channels_last: bool = True,
) -> Tensor:
    """Training batch `[N, C, H, W]` in `dtype` out of uint8 `images` `[M, H, W, C]`.

    Sample n is image `rows[n]`, padded, cropped to H x W, mirrored, divided by 255, and normalised per channel to
    (x - mean) / std. Padding is zero *before* it is normalised, as if the border were black. All tensors lie on one
    device; arithmetic is float32 (float64 for a float64 `dtype`), rounded to `dtype` once.

    Args:
        images: uint8 `[M, H, W, C]`.
        rows: int64 `[N]`, the image of each sample.
        offsets: int64 `[N, 2]`, top and left of each crop in the padded image, each in 0..2*padding.
        flips: bool `[N]`, which samples are mirrored left to right.
        padding: zero pixels on all sides.
        mean, std: one value per channel, of pixels between 0 and 1.
        dtype: floating point, of the batch.
        channels_last: the batch's memory format; contiguous where False.

    Raises OperandError for shapes or dtypes that do not fit, and on the CPU for rows or offsets that do not; on a GPU,
    where the host must not wait, those end in a device-side assertion that names them.
    """
    _check(images, rows, offsets, flips, padding, mean, std, dtype)
    return torch.ops.stablekd.augment_batch(
        images,
        rows,
        offsets,
        flips,
        padding,
        [float(value) for value in mean],
        [float(value) for value in std],
        dtype,
        channels_last,
    )


def _check(
    images: Tensor,
    rows: Tensor,
    offsets: Tensor,
    flips: Tensor,
    padding: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> None:
    if not (images.dtype == torch.uint8 and images.dim() == 4):
        raise OperandError(f"images is {describe(images)}; it must be uint8 [M, H, W, C].")
    count, channels = rows.shape[0] if rows.dim() else 0, images.shape[3]
    for name, tensor, kind, shape in (
        ("rows", rows, torch.int64, [count]),
        ("offsets", offsets, torch.int64, [count, 2]),
        ("flips", flips, torch.bool, [count]),
    ):
        if not (tensor.dtype == kind and list(tensor.shape) == shape):
            raise OperandError(f"{name} is {describe(tensor)}; it must be {str(kind).removeprefix('torch.')} {shape}.")
        if tensor.device != images.device:
            raise OperandError(f"{name} is on {tensor.device} but images on {images.device}; move it there first.")
    if padding < 0:
        raise OperandError(f"padding={padding} was given; it must not be negative.")
    if not len(mean) == len(std) == channels:
        raise OperandError(
            f"mean has {len(mean)} and std {len(std)} values; images with {channels} channels need {channels} each."
        )
    if not all(value > 0 for value in std):
        raise OperandError(f"std={list(std)} was given; every value must be greater than 0.")
    if not dtype.is_floating_point:
        raise OperandError(f"dtype={dtype} was given; it must be a floating point type.")


def _fake(images, rows, offsets, flips, padding, mean, std, dtype, channels_last):
    _, height, width, channels = images.shape
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    shape = (rows.shape[0], channels, height, width)
    return torch.empty(shape, dtype=dtype, device=images.device, memory_format=memory_format)


define(
    "augment_batch",
    "(Tensor images, Tensor rows, Tensor offsets, Tensor flips, int padding, float[] mean, float[] std, "
    "ScalarType dtype, bool channels_last) -> Tensor",
    reference.augment_batch,
    _fake,
)
serve_cpu(augment_batch=cpu_impl.augment_batch)
serve_cuda(__name__, augment_batch=reference.augment_batch)
