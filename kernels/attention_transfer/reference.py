"""Readable arithmetic of attention transfer."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from stablekd_fast.kernels._checks import accumulator
from stablekd_fast.kernels._features import length


class Operands(NamedTuple):
    """The operands of `attention_transfer`."""

    student: Tensor  # [N, C, H, W]
    target: Tensor  # [N, D, H, W]
    power: float


def attention_transfer(given: Operands) -> Tensor:
    dtype = accumulator(given.student.dtype)
    difference = _attention(given.student.to(dtype), given.power) - _attention(given.target.to(dtype), given.power)
    return difference.square().mean()


def _attention(features: Tensor, power: float) -> Tensor:
    """`[N, H * W]`, each row of unit length."""
    magnitude = features.square() if power == 2 else features.abs().pow(power)
    attention = magnitude.mean(dim=1).flatten(1)
    return attention / length(attention, [1])
