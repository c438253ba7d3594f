"""Readable arithmetic of the 8-bit codes."""

from __future__ import annotations

import torch
from torch import Tensor

from stablekd_fast.kernels._checks import laid_out_like
from stablekd_fast.kernels._features import per_channel

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def quantize_rows(rows: Tensor, dtype: torch.dtype, channel_axis: int) -> tuple[Tensor, Tensor]:
    """See `stablekd_fast.kernels.quantize_rows`."""
    values = rows.float()
    others = [axis for axis in range(1, rows.dim()) if axis != channel_axis % rows.dim()]
    magnitude = values.abs().amax(dim=others) if others else values.abs()
    # Dividing by a tensor: a Python number would become a multiplication by its inverse, which rounds differently.
    scales = magnitude / torch.full_like(magnitude, LARGEST[dtype])
    scales = torch.where(magnitude.isfinite(), scales, torch.nan)
    divisors = per_channel(torch.where(scales > 0, scales, 1.0), values, channel_axis)
    codes = values / divisors
    if dtype == torch.int8:
        # The division may round the quotient past 127; NaN has no code, its scale says it.
        codes = codes.nan_to_num(0.0).round().clamp(-127, 127)
    else:
        codes = codes.nan_to_num(0.0).clamp(-448.0, 448.0)
    return laid_out_like(codes.to(dtype), rows, dtype), scales
