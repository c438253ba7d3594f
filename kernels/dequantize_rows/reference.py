"""Readable arithmetic of reading 8-bit codes."""

from __future__ import annotations

import torch
from torch import Tensor

from stablekd_fast.kernels._checks import laid_out_like
from stablekd_fast.kernels._features import dequantized


def dequantize_rows(codes: Tensor, scales: Tensor, dtype: torch.dtype, channel_axis: int) -> Tensor:
    """See `stablekd_fast.kernels.dequantize_rows`."""
    values = dequantized(codes, scales, channel_axis, torch.float32).to(dtype)
    return laid_out_like(values, codes, dtype)
