"""Readable arithmetic of the cosine loss."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from stablekd_fast.kernels._checks import accumulator, laid_out_like, scaled
from stablekd_fast.kernels._features import LENGTH_EPSILON, dequantized, length


class Operands(NamedTuple):
    """The operands of `feature_cosine`, in the order of its schema."""

    student: Tensor  # [N, ..., C, ...]
    target: Tensor  # like the student; values or 8-bit codes
    target_scale: Tensor | None  # float32 [C] or [N, C], of codes
    per: str
    channel_axis: int


def feature_cosine(given: Operands) -> Tensor:
    """See `stablekd_fast.kernels.feature_cosine`. Differentiable, to any order."""
    student, target, axes = _widened(given)
    return _distance(student, target, axes).mean()


def feature_cosine_with_grad(given: Operands, factor: float, upstream: Tensor | None) -> tuple[Tensor, Tensor]:
    """The scaled loss and its gradient with respect to the student, in closed form."""
    student, target, axes = _widened(given)
    distance = _distance(student, target, axes)
    lengths = length(student, axes)
    unit, unit_target = student / lengths, target / length(target, axes)
    # d(1 - u.v)/ds = (u (u.v) - v) / |s|, written so that nothing cancels where u is close to v.
    gradient = ((unit - unit_target) - unit * distance) / lengths
    gradient = gradient * (factor / max(distance.numel(), 1))
    return scaled(factor * distance.mean(), upstream), laid_out_like(scaled(gradient, upstream), given.student)


def _widened(given: Operands) -> tuple[Tensor, Tensor, list[int]]:
    """Student and the target's values in the dtype that is computed in, and the axes along which vectors lie."""
    dtype, count = accumulator(given.student.dtype), given.student.dim()
    axes = [given.channel_axis % count] if given.per == "position" else list(range(1, count))
    target = dequantized(given.target, given.target_scale, given.channel_axis, dtype)
    return given.student.to(dtype), target, axes


def _distance(student: Tensor, target: Tensor, axes: list[int]) -> Tensor:
    """1 - u.v as half of |u - v|^2 + (1 - |u|^2) + (1 - |v|^2): exact where u and v nearly agree."""
    lengths, target_lengths = length(student, axes), length(target, axes)
    apart = (student / lengths - target / target_lengths).square().sum(dim=axes, keepdim=True)
    short = LENGTH_EPSILON / lengths.square() + LENGTH_EPSILON / target_lengths.square()
    return (apart + short) / 2
