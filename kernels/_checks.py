"""The error for unusable operands, and helpers that several operators share.

Checks write `if` and `raise`: a call takes microseconds, of which messages that nobody reads would be a tenth.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from stablekd_fast.errors import StableKDError

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""What the fused implementations compute in single precision; float64 is the references'."""


Given = TypeVar("Given", bound=NamedTuple)
"""The operands of a loss, as its `reference.py` lists them. The first of them is the student."""


class OperandError(StableKDError, ValueError):
    """A tensor or number that an operator cannot take."""


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
    """Raise OperandError unless `upstream` is None or a 0-dim floating point tensor beside the student."""
    if upstream is None:
        return
    if not (upstream.dim() == 0 and upstream.is_floating_point()):
        raise OperandError(f"upstream is {describe(upstream)}; it must be a 0-dim floating point tensor.")
    if upstream.device != student.device:
        raise OperandError(
            f"upstream is on {upstream.device} but the student on {student.device}; move it there first."
        )
