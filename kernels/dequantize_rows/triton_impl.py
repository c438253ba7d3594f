"""`dequantize_rows` by Triton: equal to the reference to the last bit, codes read once and values written once."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from stablekd_fast.kernels._checks import FLOATS, laid_out_like
from stablekd_fast.kernels._features_triton import (
    BLOCK,
    EXTENTS,
    as_bytes,
    dequantized,
    extents,
    fits,
    flat,
    owners,
)
from stablekd_fast.kernels._launch import ALIGNMENTS, Listed, aligned, launch, packed, variant
from stablekd_fast.kernels._layout import dense, feature_layout
from stablekd_fast.kernels.dequantize_rows import reference


@triton.jit(do_not_specialize=["count", *EXTENTS])
def dequantize_elements(
    codes_at,  # int8, or uint8 for float8_e4m3fn
    scales_at,  # float32 [C] or [N, C]
    out_at,
    count: tl.int64,
    outer: tl.int64,
    channels: tl.int64,
    inner: tl.int64,
    scales_stride: tl.int64,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    lanes = tl.arange(0, BLOCK)
    # Dividing and multiplying tells the compiler of the multiple that vector loads and stores need.
    inside = first + lanes < count // ALIGN * ALIGN
    sample, channel = owners(first, lanes, outer, channels, inner)
    values = dequantized(codes_at + first + lanes, scales_at, scales_stride, sample, channel, inside)
    tl.store(out_at + first + lanes, values.to(out_at.dtype.element_ty), mask=inside)


def dequantize_rows(codes: Tensor, scales: Tensor, dtype: torch.dtype, channel_axis: int) -> Tensor:
    filled = dense(codes)
    if codes.numel() == 0 or not fits(feature_layout(filled, channel_axis)):
        return reference.dequantize_rows(codes, scales, dtype, channel_axis)
    out = torch.empty_like(filled, dtype=dtype)
    arguments = _arguments(aligned(as_bytes(filled)), packed(scales, torch.float32), out, codes.numel())
    arguments |= extents(feature_layout(filled, channel_axis), scales)
    launch(dequantize_elements, (triton.cdiv(codes.numel(), BLOCK),), arguments, *flat(codes.numel()))
    return laid_out_like(out, codes, dtype)


def specialisations() -> Iterator[Listed]:
    for codes, dtype, align in product((torch.int8, torch.uint8), FLOATS, ALIGNMENTS):
        arguments = _arguments(codes, torch.float32, dtype, 0) | dict.fromkeys(EXTENTS, 0)
        listed = variant(dequantize_elements, arguments, *flat(align))
        yield Listed(dequantize_elements, listed, wide_stores=align > 1)


def _arguments(codes, scales, out, count: int) -> dict:
    return {"codes_at": codes, "scales_at": scales, "out_at": out, "count": count}
