"""`quantize_rows` by Triton: equal to the reference to the last bit.

Contiguous maps: a channel of a sample is a run of memory and lies in registers, so it is read once; runs of more than
8192 elements, and channels-last maps, are read twice. Other layouts (channels between other axes) have the reference.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from stablekd_fast.kernels._checks import FLOATS, laid_out_like
from stablekd_fast.kernels._features_triton import as_bytes
from stablekd_fast.kernels._launch import ALIGNMENTS, Listed, aligned, alignment, launch, variant
from stablekd_fast.kernels._layout import dense, feature_layout
from stablekd_fast.kernels._logits_triton import BLOCKS, tiling
from stablekd_fast.kernels.quantize_rows import reference

_INTEGERS = ("runs", "length", "channels")
_TALL, _BROAD = 32, 32
_WARPS = 4


@triton.jit(do_not_specialize=list(_INTEGERS))
def quantize_runs(
    rows_at,  # [runs, length]
    codes_at,  # int8, or uint8 for float8_e4m3fn, [runs, length]
    scales_at,  # float32 [runs]
    runs: tl.int64,
    length: tl.int64,
    channels: tl.int64,
    largest,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """ROWS runs held in registers."""
    # Dividing and multiplying tells the compiler of the multiple that vector loads and stores need.
    length = length // ALIGN * ALIGN
    run = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)[None, :]
    inside = (run < runs)[:, None] & (cols < length.to(tl.int32))
    place = (run * length)[:, None] + cols
    values = tl.load(rows_at + place, mask=inside, other=0.0).to(tl.float32)
    scale = scale_of(magnitudes(values, 1), largest)
    tl.store(scales_at + run, scale, mask=run < runs)
    tl.store(codes_at + place, encoded(values, scale[:, None], largest, codes_at), mask=inside)


@triton.jit(do_not_specialize=list(_INTEGERS))
def quantize_long_runs(
    rows_at,  # [runs, length]
    codes_at,  # int8, or uint8 for float8_e4m3fn, [runs, length]
    scales_at,  # float32 [runs]
    runs: tl.int64,
    length: tl.int64,
    channels: tl.int64,
    largest,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """One run (ROWS is 1), read twice in chunks."""
    length = length // ALIGN * ALIGN
    first = tl.program_id(0).to(tl.int64) * ROWS * length
    seen = tl.zeros([BLOCK], tl.float32)
    for start in range(0, length, BLOCK):
        place = start + tl.arange(0, BLOCK)
        values = tl.load(rows_at + first + place, mask=place < length, other=0.0).to(tl.float32)
        seen = tl.maximum(seen, tl.abs(values), propagate_nan=tl.PropagateNan.ALL)
    scale = scale_of(magnitudes(seen, 0), largest)
    tl.store(scales_at + tl.program_id(0), scale)
    for start in range(0, length, BLOCK):
        place = start + tl.arange(0, BLOCK)
        values = tl.load(rows_at + first + place, mask=place < length, other=0.0).to(tl.float32)
        tl.store(codes_at + first + place, encoded(values, scale, largest, codes_at), mask=place < length)


@triton.jit(do_not_specialize=list(_INTEGERS))
def quantize_columns(
    rows_at,  # [samples, length, channels]
    codes_at,  # int8, or uint8 for float8_e4m3fn, [samples, length, channels]
    scales_at,  # float32 [samples, channels]
    runs: tl.int64,
    length: tl.int64,
    channels: tl.int64,
    largest,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """BLOCK channels of one sample, read twice, ROWS positions at a time."""
    channels = channels // ALIGN * ALIGN
    sample = tl.program_id(0).to(tl.int64)
    channel = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    seen = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, length, ROWS):
        position = (start + tl.arange(0, ROWS))[:, None]
        inside = (position < length) & (channel < channels)
        place = (sample * length + position) * channels + channel
        values = tl.load(rows_at + place, mask=inside, other=0.0).to(tl.float32)
        seen = tl.maximum(seen, tl.abs(values), propagate_nan=tl.PropagateNan.ALL)
    scale = scale_of(magnitudes(seen, 0), largest)
    own = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(scales_at + sample * channels + own, scale, mask=own < channels)
    for start in range(0, length, ROWS):
        position = (start + tl.arange(0, ROWS))[:, None]
        inside = (position < length) & (channel < channels)
        place = (sample * length + position) * channels + channel
        values = tl.load(rows_at + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(codes_at + place, encoded(values, scale[None, :], largest, codes_at), mask=inside)


@triton.jit
def magnitudes(values, AXIS: tl.constexpr):
    """The largest magnitude along AXIS; NaN or infinity where there is one."""
    # Bit patterns of magnitudes are ordered as the numbers are, and those of NaN lie above infinity.
    bits = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(bits, AXIS).to(tl.float32, bitcast=True)


@triton.jit
def scale_of(magnitude, largest):
    return tl.where(magnitude < float("inf"), tl.div_rn(magnitude, largest), float("nan"))


@triton.jit
def encoded(values, scale, largest, codes_at):
    """Codes nearest to `values / scale`, ties to even; 0 for NaN."""
    quotient = tl.div_rn(values, tl.where(scale > 0, scale, 1.0))
    quotient = tl.where(quotient == quotient, quotient, 0.0)
    quotient = tl.minimum(tl.maximum(quotient, -largest), largest)
    if codes_at.dtype.element_ty == tl.uint8:
        codes = to_e4m3(quotient)
    else:
        # From 1.5 * 2^23 on float32 holds nothing but integers.
        codes = ((quotient + 12582912.0) - 12582912.0).to(tl.int8)
    return codes


@triton.jit
def to_e4m3(values):
    """The float8_e4m3fn codes nearest to `values` between -448 and 448, by integers."""
    bits = values.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Rounded to three bits of fraction, ties to even; the exponent's bias is 7 instead of 127.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 codes are multiples of 2^-9.
    small = ((magnitude.to(tl.float32, bitcast=True) * 512.0 + 12582912.0) - 12582912.0).to(tl.uint32)
    code = tl.where(magnitude < (121 << 23), small, normal)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


def quantize_rows(rows: Tensor, dtype: torch.dtype, channel_axis: int) -> tuple[Tensor, Tensor]:
    if rows.numel() == 0:
        return reference.quantize_rows(rows, dtype, channel_axis)
    filled = aligned(dense(rows))
    layout = feature_layout(filled, channel_axis)
    if layout.inner > 1 and layout.outer > layout.samples:
        return reference.quantize_rows(rows, dtype, channel_axis)
    codes = torch.empty_like(filled, dtype=dtype)
    scales = torch.empty((layout.samples, layout.channels), dtype=torch.float32, device=rows.device)
    tensors = (filled, as_bytes(codes), scales)
    if layout.inner == 1:
        length = layout.outer // layout.samples
        grid = (layout.samples, triton.cdiv(layout.channels, _BROAD))
        kernel, constants, warps = _columns(layout.channels)
    else:
        length = layout.inner
        kernel, constants, warps = _runs(length)
        grid = (triton.cdiv(scales.numel(), constants["ROWS"]),)
    arguments = _arguments(tensors, (scales.numel(), length, layout.channels), reference.LARGEST[dtype])
    launch(kernel, grid, arguments, constants, warps)
    return laid_out_like(codes, rows, dtype), scales


def specialisations() -> Iterator[Listed]:
    ways = [_runs(length) for block in (*BLOCKS, BLOCKS[-1] + 8) for length in (block, block - 1)]
    ways += [_columns(channels) for channels in ALIGNMENTS]
    for rows, codes, (kernel, constants, warps) in product(FLOATS, (torch.int8, torch.uint8), ways):
        arguments = _arguments((rows, codes, torch.float32), (0, 0, 0), 0.0)
        yield Listed(kernel, variant(kernel, arguments, constants, warps))


def _runs(length: int) -> tuple:
    """Return kernel, constants and warps for channels that are runs of memory."""
    align = alignment(length)
    tile = tiling(length, align)
    kernel = quantize_runs if tile.block >= length else quantize_long_runs
    return kernel, tile.constants | {"ALIGN": align}, tile.warps


def _columns(channels: int) -> tuple:
    """Return kernel, constants and warps for channels-last maps."""
    return quantize_columns, {"ROWS": _TALL, "BLOCK": _BROAD, "ALIGN": alignment(channels)}, _WARPS


def _arguments(tensors, integers, largest: float) -> dict:
    return (
        dict(zip(("rows_at", "codes_at", "scales_at"), tensors)) | dict(zip(_INTEGERS, integers)) | {"largest": largest}
    )
