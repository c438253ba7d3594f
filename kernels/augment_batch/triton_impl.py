"""`augment_batch` by Triton: equal to the reference to the last bit, each value read once and written once.

Every program works on a stretch of one sample's memory as it will be written, so that stores are wide and the
reads, one byte each, fall close together. NCHW: a stretch of pixels, for all channels, stored plane by plane.
Channels-last: a stretch of values, channels innermost. With more than four channels there is a launch per channel.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from stablekd_fast.kernels._checks import FLOATS
from stablekd_fast.kernels._launch import ALIGNMENTS, Listed, aligned, alignment, launch, variant
from stablekd_fast.kernels.augment_batch import reference

_INTEGERS = ("count", "height", "width", "channels", "first", "padding", "pixel_stride")
_NUMBERS = ("mean_0", "mean_1", "mean_2", "mean_3", "std_0", "std_1", "std_2", "std_3")
_MOST_CHANNELS = 4
_BLOCK = 1024
_WARPS = 4
# Positions within an image are int32, as 64-bit divisions would cost more than the memory traffic.
_LARGEST_IMAGE = 2**31 - _BLOCK


@triton.jit(do_not_specialize=list(_INTEGERS), do_not_specialize_on_alignment=["images_at"])
def augment_planes(
    images_at,  # uint8 [M, height, width, channels]
    rows_at,  # int64 [N]
    offsets_at,  # int64 [N, 2]
    flips_at,  # bool [N]
    out_at,  # [N, channels, height, width], pixels pixel_stride apart
    allowed_at,  # bool [N]
    count: tl.int64,
    height: tl.int64,
    width: tl.int64,
    channels: tl.int64,
    first: tl.int64,
    padding: tl.int64,
    pixel_stride: tl.int64,
    mean_0,
    mean_1,
    mean_2,
    mean_3,
    std_0,
    std_1,
    std_2,
    std_3,
    GROUP: tl.constexpr,
    DENSE: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Channels `first` to `first` + GROUP of BLOCK pixels of a sample; DENSE: planes, pixel_stride is 1."""
    # Dividing and multiplying tells the compiler of the multiple that vector stores need.
    pixels = (height * width // ALIGN * ALIGN).to(tl.int32)
    blocks = tl.cdiv(pixels, BLOCK)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    position = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    written = position < pixels
    source, inside = pixel_source(
        images_at, rows_at, offsets_at, flips_at, allowed_at, sample, position, count, height, width, channels, padding
    )
    out_at += sample * (channels * pixels.to(tl.int64))
    for place in tl.static_range(GROUP):
        values = tl.load(source + first + place, mask=inside & written, other=0)
        mean = per_channel(place, mean_0, mean_1, mean_2, mean_3, GROUP)
        std = per_channel(place, std_0, std_1, std_2, std_3, GROUP)
        values = normalised(values, mean, std).to(out_at.dtype.element_ty)
        if DENSE:
            tl.store(out_at + (first + place) * pixels.to(tl.int64) + position, values, mask=written)
        else:
            tl.store(out_at + (first + place) + position * pixel_stride, values, mask=written)


@triton.jit(do_not_specialize=list(_INTEGERS), do_not_specialize_on_alignment=["images_at"])
def augment_pixels(
    images_at,  # uint8 [M, height, width, GROUP]
    rows_at,  # int64 [N]
    offsets_at,  # int64 [N, 2]
    flips_at,  # bool [N]
    out_at,  # [N, height, width, GROUP]
    allowed_at,  # bool [N]
    count: tl.int64,
    height: tl.int64,
    width: tl.int64,
    channels: tl.int64,
    first: tl.int64,
    padding: tl.int64,
    pixel_stride: tl.int64,
    mean_0,
    mean_1,
    mean_2,
    mean_3,
    std_0,
    std_1,
    std_2,
    std_3,
    GROUP: tl.constexpr,
    DENSE: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """BLOCK values of a channels-last sample."""
    size = (height * width * GROUP // ALIGN * ALIGN).to(tl.int32)
    blocks = tl.cdiv(size, BLOCK)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    position = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    written = position < size
    pixel = position.to(tl.uint32) // GROUP
    channel = position - (pixel * GROUP).to(tl.int32)
    source, inside = pixel_source(
        images_at, rows_at, offsets_at, flips_at, allowed_at, sample, pixel, count, height, width, channels, padding
    )
    values = tl.load(source + channel, mask=inside & written, other=0)
    mean = per_channel(channel, mean_0, mean_1, mean_2, mean_3, GROUP)
    std = per_channel(channel, std_0, std_1, std_2, std_3, GROUP)
    values = normalised(values, mean, std).to(out_at.dtype.element_ty)
    tl.store(out_at + sample * size + position, values, mask=written)


@triton.jit
def pixel_source(
    images_at, rows_at, offsets_at, flips_at, allowed_at, sample, position, count, height, width, channels, padding
):
    """Return where the first channel of the pixels at `position` of the crop is read, and which are not padding.

    Whether row and offsets are allowed is noted; nothing is read where they are not.
    """
    row = tl.load(rows_at + sample)
    top, left = tl.load(offsets_at + 2 * sample), tl.load(offsets_at + 2 * sample + 1)
    allowed = (row >= 0) & (row < count) & (top >= 0) & (top <= 2 * padding) & (left >= 0) & (left <= 2 * padding)
    tl.store(allowed_at + sample, allowed)
    rows, cols = height.to(tl.uint32), width.to(tl.uint32)
    # Unsigned divisions are the cheaper ones, and a negative place is a very large unsigned one.
    y = position.to(tl.uint32) // cols
    x = position.to(tl.uint32) - y * cols
    x = tl.where(tl.load(flips_at + sample), cols - 1 - x, x)
    y += (top - padding).to(tl.uint32)
    x += (left - padding).to(tl.uint32)
    inside = allowed & (y < rows) & (x < cols)
    return images_at + row * (height * width * channels) + (y * cols + x) * channels.to(tl.uint32), inside


@triton.jit
def per_channel(channel, value_0, value_1, value_2, value_3, GROUP: tl.constexpr):
    value = value_0
    if GROUP > 1:
        value = tl.where(channel == 1, value_1, value)
    if GROUP > 2:
        value = tl.where(channel == 2, value_2, value)
    if GROUP > 3:
        value = tl.where(channel == 3, value_3, value)
    return value


@triton.jit
def normalised(values, mean, std):
    """(values / 255 - mean) / std with the roundings of the reference."""
    return tl.div_rn(tl.div_rn(values.to(tl.float32), 255.0) - mean, std)


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
    """Rows and offsets that do not fit fail on the device, which is not awaited."""
    count, height, width, channels = images.shape
    if dtype not in FLOATS or 0 in (len(rows), images.numel()) or height * width * channels > _LARGEST_IMAGE:
        return reference.augment_batch(images, rows, offsets, flips, padding, mean, std, dtype, channels_last)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty(
        (len(rows), channels, height, width), dtype=dtype, device=images.device, memory_format=memory_format
    )
    allowed = torch.empty(len(rows), dtype=torch.bool, device=images.device)
    # Images are read byte by byte, and a copy of them all would cost far more than the batch.
    picks = [aligned(tensor.contiguous()) for tensor in (rows, offsets, flips)]
    tensors = [images.contiguous(), *picks, out, allowed]
    together = channels <= _MOST_CHANNELS
    group = channels if together else 1
    kernel = augment_pixels if channels_last and together else augment_planes
    size = height * width * (channels if kernel is augment_pixels else 1)
    for first in range(0, channels, group):
        integers = (count, height, width, channels, first, padding, channels if channels_last else 1)
        numbers = [(values[first : first + group] + [1.0] * _MOST_CHANNELS)[:_MOST_CHANNELS] for values in (mean, std)]
        constants = _constants(kernel, group, dense=together or not channels_last, size=size)
        grid = (len(rows) * triton.cdiv(size, _BLOCK),)
        launch(kernel, grid, _arguments(tensors, integers, numbers[0] + numbers[1]), constants, _WARPS)
    torch._assert_async(allowed.all(), "augment_batch: rows or offsets lie outside the images or their padding.")
    return out


def specialisations() -> Iterator[Listed]:
    integers, numbers = [0] * len(_INTEGERS), [0.0] * len(_NUMBERS)
    groups = range(1, _MOST_CHANNELS + 1)
    shapes = [(kernel, group, True) for kernel in (augment_planes, augment_pixels) for group in groups]
    for dtype, (kernel, group, dense), size in product(FLOATS, [*shapes, (augment_planes, 1, False)], ALIGNMENTS):
        tensors = (torch.uint8, torch.int64, torch.int64, torch.bool, dtype, torch.bool)
        constants = _constants(kernel, group, dense, size)
        listed = variant(kernel, _arguments(tensors, integers, numbers), constants, _WARPS)
        if dense or size == 1:
            yield Listed(kernel, listed, wide_stores=dense and size * dtype.itemsize >= 16)


def _constants(kernel, group: int, dense: bool, size: int) -> dict:
    """`size`: elements of `out` that a kernel's programs share; strided pixels gain nothing from alignment."""
    align = alignment(size) if dense else 1
    return {"GROUP": group, "DENSE": dense, "BLOCK": _BLOCK, "ALIGN": align}


def _arguments(tensors, integers, numbers) -> dict:
    names = ("images", "rows", "offsets", "flips", "out", "allowed")
    arguments = {f"{name}_at": tensor for name, tensor in zip(names, tensors)}
    return arguments | dict(zip(_INTEGERS, map(int, integers))) | dict(zip(_NUMBERS, map(float, numbers)))
