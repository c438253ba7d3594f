"""Values of activations that were stored as 8-bit codes."""

from __future__ import annotations

import torch
from torch import Tensor

from stablekd_fast.kernels._checks import FLOATS, OperandError, describe
from stablekd_fast.kernels._features import CODES, check_channel_axis, check_scales
from stablekd_fast.kernels._registry import define, serve_cpu, serve_cuda
from stablekd_fast.kernels.dequantize_rows import cpu_impl, reference


def dequantize_rows(
    codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32, *, channel_axis: int = 1
) -> Tensor:
    """`codes` (int8 or float8_e4m3fn `[N, ..., C, ...]`) times `scales` (float32 `[N, C]` or `[C]`), as `dtype`.

    The product is taken in float32 and rounded to `dtype` (float32, bfloat16 or float16) once, so every
    implementation gives the same bits. Shape and memory format are those of `codes`. Raises OperandError for shapes
    or dtypes that do not fit.
    """
    if not (codes.dim() >= 2 and codes.dtype in CODES):
        raise OperandError(
            f"codes is {describe(codes)}; it must be int8 or float8_e4m3fn with a batch axis and at least one more."
        )
    if dtype not in FLOATS:
        raise OperandError(f"dtype={dtype} was given; it must be torch.float32, torch.bfloat16 or torch.float16.")
    check_channel_axis(codes, channel_axis)
    check_scales(codes, scales, channel_axis, "codes")
    return torch.ops.stablekd.dequantize_rows(codes, scales, dtype, channel_axis)


def _fake(codes, scales, dtype, channel_axis):
    return torch.empty_like(codes, dtype=dtype)


define(
    "dequantize_rows",
    "(Tensor codes, Tensor scales, ScalarType dtype, int channel_axis) -> Tensor",
    reference.dequantize_rows,
    _fake,
)
serve_cpu(dequantize_rows=cpu_impl.dequantize_rows)
serve_cuda(__name__, dequantize_rows=reference.dequantize_rows)
