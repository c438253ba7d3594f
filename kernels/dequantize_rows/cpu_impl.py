"""`dequantize_rows` by the C++ core."""

from __future__ import annotations

import torch
from torch import Tensor

from stablekd_fast.kernels._checks import laid_out_like
from stablekd_fast.kernels._cpu import GRAIN, TYPES, threads
from stablekd_fast.kernels._features import scale_stride
from stablekd_fast.kernels._layout import dense, feature_layout
from stablekd_fast.kernels._native import core
from stablekd_fast.kernels.dequantize_rows import reference


def dequantize_rows(codes: Tensor, scales: Tensor, dtype: torch.dtype, channel_axis: int) -> Tensor:
    if codes.numel() == 0:
        return reference.dequantize_rows(codes, scales, dtype, channel_axis)
    filled, scales = dense(codes), scales.contiguous()
    values, layout = torch.empty_like(filled, dtype=dtype), feature_layout(filled, channel_axis)
    core.dequantize_rows(
        filled.data_ptr(),
        TYPES[filled.dtype],
        scales.data_ptr(),
        scale_stride(scales, layout),
        values.data_ptr(),
        TYPES[dtype],
        layout,
        threads(codes.numel(), GRAIN),
    )
    return laid_out_like(values, codes, dtype)
