"""Readable arithmetic of the cosine loss."""

from __future__ import annotations

from stablekd_fast.kernels._checks import accumulator, laid_out_like, scaled
from stablekd_fast.kernels._features import LENGTH_EPSILON, dequantized, length
from torch import Tensor


def feature_cosine(student: Tensor, target: Tensor, target_scale: Tensor | None, per: str, channel_axis: int) -> Tensor:
    """See `stablekd_fast.kernels.feature_cosine`. Differentiable, to any order."""
    dtype = accumulator(student.dtype)
    student, target = student.to(dtype), dequantized(target, target_scale, channel_axis, dtype)
    axes = _vector_axes(student, per, channel_axis)
    return _distance(student, target, axes).mean()


def feature_cosine_with_grad(
    student: Tensor,
    target: Tensor,
    target_scale: Tensor | None,
    per: str,
    channel_axis: int,
    factor: float,
    upstream: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The scaled loss and its gradient with respect to the student, in closed form."""
    dtype = accumulator(student.dtype)
    wide, wide_target = student.to(dtype), dequantized(target, target_scale, channel_axis, dtype)
    axes = _vector_axes(wide, per, channel_axis)
    distance = _distance(wide, wide_target, axes)
    lengths = length(wide, axes)
    unit, unit_target = wide / lengths, wide_target / length(wide_target, axes)
    # d(1 - u.v)/ds = (u (u.v) - v) / |s|, written so that nothing cancels where u is close to v.
    gradient = ((unit - unit_target) - unit * distance) / lengths
    gradient = gradient * (factor / max(distance.numel(), 1))
    return scaled(factor * distance.mean(), upstream), laid_out_like(scaled(gradient, upstream), student)


def _distance(student: Tensor, target: Tensor, axes: list[int]) -> Tensor:
    """1 - u.v as half of |u - v|^2 + (1 - |u|^2) + (1 - |v|^2): exact where u and v nearly agree."""
    lengths, target_lengths = length(student, axes), length(target, axes)
    apart = (student / lengths - target / target_lengths).square().sum(dim=axes, keepdim=True)
    short = LENGTH_EPSILON / lengths.square() + LENGTH_EPSILON / target_lengths.square()
    return (apart + short) / 2


def _vector_axes(features: Tensor, per: str, channel_axis: int) -> list[int]:
    return [channel_axis % features.dim()] if per == "position" else list(range(1, features.dim()))
