"""The error for unusable operands, and helpers that several operators share."""

from __future__ import annotations

import torch
from torch import Tensor

from stablekd_fast.errors import StableKDError

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""What the fused implementations compute in single precision; float64 is the references'."""


class OperandError(StableKDError, ValueError):
    """A tensor or number that an operator cannot take."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise OperandError(message)


def describe(tensor: Tensor) -> str:
    """Dtype and shape, as they appear in messages: `float32 [8, 10]`."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that an operator computes in: float64 stays, everything else is at least float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def laid_out_like(value: Tensor, model: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`value` in `dtype` (by default the model's) and the memory format of `model`, copied only where they differ."""
    dtype = dtype or model.dtype
    if value.dtype == dtype and value.stride() == model.stride():
        return value
    out = torch.empty_like(model, dtype=dtype)
    if value.dtype == out.dtype and value.stride() == out.stride():
        return value
    return out.copy_(value)


def scaled(value: Tensor, upstream: Tensor | None) -> Tensor:
    """`value` times the 0-dim `upstream`, where there is one."""
    return value if upstream is None else value * upstream.to(value.dtype)


def check_upstream(upstream: Tensor | None, student: Tensor) -> None:
    """Raises OperandError unless `upstream` is None or a 0-dim floating point tensor beside the student."""
    if upstream is None:
        return
    require(
        upstream.dim() == 0 and upstream.is_floating_point(),
        f"upstream is {describe(upstream)}; it must be a 0-dim floating point tensor.",
    )
    require(
        upstream.device == student.device,
        f"upstream is on {upstream.device} but the student on {student.device}; move it there first.",
    )
