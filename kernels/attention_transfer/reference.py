"""Readable arithmetic of attention transfer."""

from __future__ import annotations

from stablekd_fast.kernels._checks import accumulator
from stablekd_fast.kernels._features import length
from torch import Tensor


def attention_transfer(student: Tensor, target: Tensor, power: float) -> Tensor:
    dtype = accumulator(student.dtype)
    apart = _attention(student.to(dtype), power) - _attention(target.to(dtype), power)
    return apart.square().mean()


def _attention(features: Tensor, power: float) -> Tensor:
    """`[N, H * W]`, each row of unit length."""
    magnitude = features.square() if power == 2 else features.abs().pow(power)
    attention = magnitude.mean(dim=1).flatten(1)
    return attention / length(attention, [1])
