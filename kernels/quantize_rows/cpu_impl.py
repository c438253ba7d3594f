"""`quantize_rows` by the C++ core."""

from __future__ import annotations

import torch
from torch import Tensor

from stablekd_fast.kernels._checks import laid_out_like
from stablekd_fast.kernels._cpu import GRAIN, TYPES, threads
from stablekd_fast.kernels._layout import dense, feature_layout
from stablekd_fast.kernels._native import core
from stablekd_fast.kernels.quantize_rows import reference


def quantize_rows(rows: Tensor, dtype: torch.dtype, channel_axis: int) -> tuple[Tensor, Tensor]:
    if rows.numel() == 0:
        return reference.quantize_rows(rows, dtype, channel_axis)
    filled = dense(rows)
    codes = torch.empty_like(filled, dtype=dtype)
    scales = torch.empty((rows.shape[0], rows.shape[channel_axis]), dtype=torch.float32)
    core.quantize_rows(
        filled.data_ptr(),
        TYPES[filled.dtype],
        codes.data_ptr(),
        TYPES[dtype],
        scales.data_ptr(),
        feature_layout(filled, channel_axis),
        threads(rows.numel(), GRAIN),
    )
    return laid_out_like(codes, rows, dtype), scales
