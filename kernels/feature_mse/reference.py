"""Readable arithmetic of the feature losses."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from stablekd_fast.kernels._checks import accumulator, laid_out_like, scaled
from stablekd_fast.kernels._features import dequantized, length

POWER_FLOOR = 1e-12
CHANNEL_EPSILON = 1e-5


class Operands(NamedTuple):
    """The operands of `feature_mse`, in the order of its schema."""

    student: Tensor  # [N, ..., C, ...]
    target: Tensor  # like the student; values or 8-bit codes
    target_scale: Tensor | None  # float32 [C] or [N, C], of codes
    normalize: str | None
    power: Tensor | None  # [], given for the target's own mean square
    channel_axis: int


def feature_mse(given: Operands) -> Tensor:
    """See `stablekd_fast.kernels.feature_mse`. Differentiable, to any order."""
    return _loss(*_widened(given), given)


def feature_mse_with_grad(given: Operands, factor: float, upstream: Tensor | None) -> tuple[Tensor, Tensor]:
    """The scaled loss and its gradient with respect to the student, in closed form."""
    student, target = _widened(given)
    if given.normalize == "l2":
        loss = _loss(student, target, given)
        gradient = _l2_gradient(student, target) * (factor / max(len(student), 1))
    else:
        difference = student - target
        pull = difference
        if given.normalize == "channel":
            pull = difference / _channel_variance(target, given.channel_axis)
        divisor = _power(target, given.power) if given.normalize == "power" else 1
        loss = (difference * pull).mean() / divisor
        gradient = pull * (2 * factor / max(student.numel(), 1) / divisor)
    return scaled(factor * loss, upstream), laid_out_like(scaled(gradient, upstream), given.student)


def _loss(student: Tensor, target: Tensor, given: Operands) -> Tensor:
    """The loss of student and target in the dtype that is computed in."""
    if given.normalize == "l2":
        return (_unit(student)[0] - _unit(target)[0]).square().sum() / max(len(student), 1)
    squares = (student - target).square()
    if given.normalize == "channel":
        squares = squares / _channel_variance(target, given.channel_axis)
    loss = squares.mean()
    return loss / _power(target, given.power) if given.normalize == "power" else loss


def _widened(given: Operands) -> tuple[Tensor, Tensor]:
    """Student and the target's values in the dtype that is computed in."""
    dtype = accumulator(given.student.dtype)
    return given.student.to(dtype), dequantized(given.target, given.target_scale, given.channel_axis, dtype)


def _power(target: Tensor, power: Tensor | None) -> Tensor:
    power = target.square().mean() if power is None else power.to(target.dtype)
    return power.clamp_min(POWER_FLOOR)


def _channel_variance(target: Tensor, channel_axis: int) -> Tensor:
    """Population variance of each channel over everything else, with the epsilon usual in batch norm."""
    others = [axis for axis in range(target.dim()) if axis != channel_axis % target.dim()]
    return target.var(dim=others, correction=0, keepdim=True) + CHANNEL_EPSILON


def _unit(features: Tensor) -> tuple[Tensor, Tensor]:
    """Each sample scaled to unit length, and the lengths."""
    lengths = length(features, list(range(1, features.dim())))
    return features / lengths, lengths


def _l2_gradient(student: Tensor, target: Tensor) -> Tensor:
    """With u = s / |s| the gradient of |u - v|^2 is the part of 2 (u - v) that is orthogonal to u, over |s|."""
    unit, lengths = _unit(student)
    pull = 2 * (unit - _unit(target)[0])
    along = (unit * pull).sum(dim=list(range(1, student.dim())), keepdim=True)
    return (pull - unit * along) / lengths
