"""Activations as 8-bit codes with a scale per sample and channel."""

from __future__ import annotations

import torch
from torch import Tensor

from stablekd_fast.kernels._checks import FLOATS, OperandError, describe
from stablekd_fast.kernels._features import CODES, check_channel_axis
from stablekd_fast.kernels._registry import define, serve_cpu, serve_cuda
from stablekd_fast.kernels.quantize_rows import cpu_impl, reference


def quantize_rows(rows: Tensor, dtype: torch.dtype = torch.int8, *, channel_axis: int = 1) -> tuple[Tensor, Tensor]:
    """Codes in `dtype` (int8 or float8_e4m3fn), shaped and laid out like `rows`, and float32 scales `[N, C]`.

    `rows` is `[N, ..., C, ...]` with channels on `channel_axis`. A scale is the largest magnitude of its channel in
    its sample over the largest code (127 or 448); a code is value / scale, rounded to nearest, ties to even. An
    all-zero channel has the scale 0. A channel with an infinity or NaN has the scale NaN, and comes back as NaN.
    The arithmetic is float32. For `[N, C]` there is one element per scale: give it as `[N, 1, C]` for one scale per
    sample.

    Every implementation gives the same bits. Raises OperandError for shapes or dtypes that do not fit.
    """
    if not (rows.dim() >= 2 and rows.dtype in FLOATS):
        raise OperandError(
            f"rows is {describe(rows)}; "
            "it must be float32, bfloat16 or float16 with a batch axis and at least one more."
        )
    if dtype not in CODES:
        raise OperandError(f"dtype={dtype} was given; it must be torch.int8 or torch.float8_e4m3fn.")
    check_channel_axis(rows, channel_axis)
    return torch.ops.stablekd.quantize_rows(rows, dtype, channel_axis)


def _fake(rows, dtype, channel_axis):
    scales = rows.new_empty((rows.shape[0], rows.shape[channel_axis]), dtype=torch.float32)
    return torch.empty_like(rows, dtype=dtype), scales


define(
    "quantize_rows",
    "(Tensor rows, ScalarType dtype, int channel_axis) -> (Tensor, Tensor)",
    reference.quantize_rows,
    _fake,
)
serve_cpu(quantize_rows=cpu_impl.quantize_rows)
serve_cuda(__name__, quantize_rows=reference.quantize_rows)
