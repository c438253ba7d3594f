"""Readable arithmetic of the feature losses."""

from __future__ import annotations

from stablekd_fast.kernels._checks import accumulator, laid_out_like, scaled
from stablekd_fast.kernels._features import dequantized, length
from torch import Tensor

POWER_FLOOR = 1e-12
CHANNEL_EPSILON = 1e-5


def feature_mse(
    student: Tensor,
    target: Tensor,
    target_scale: Tensor | None,
    normalize: str | None,
    power: Tensor | None,
    channel_axis: int,
) -> Tensor:
    """See `stablekd_fast.kernels.feature_mse`. Differentiable, to any order."""
    student, target = _operands(student, target, target_scale, channel_axis)
    if normalize == "l2":
        return (_unit(student)[0] - _unit(target)[0]).square().sum() / max(len(student), 1)
    squares = (student - target).square()
    if normalize == "channel":
        squares = squares / _channel_variance(target, channel_axis)
    loss = squares.mean()
    return loss / _power(target, power) if normalize == "power" else loss


def feature_mse_with_grad(
    student: Tensor,
    target: Tensor,
    target_scale: Tensor | None,
    normalize: str | None,
    power: Tensor | None,
    channel_axis: int,
    factor: float,
    upstream: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The scaled loss and its gradient with respect to the student, in closed form."""
    wide, wide_target = _operands(student, target, target_scale, channel_axis)
    if normalize == "l2":
        loss = feature_mse(wide, wide_target, None, normalize, power, channel_axis)
        gradient = _l2_gradient(wide, wide_target) * (factor / max(len(wide), 1))
    else:
        difference = wide - wide_target
        pull = difference
        if normalize == "channel":
            pull = difference / _channel_variance(wide_target, channel_axis)
        divisor = _power(wide_target, power) if normalize == "power" else 1
        loss = (difference * pull).mean() / divisor
        gradient = pull * (2 * factor / max(wide.numel(), 1) / divisor)
    return scaled(factor * loss, upstream), laid_out_like(scaled(gradient, upstream), student)


def _operands(student: Tensor, target: Tensor, target_scale: Tensor | None, channel_axis: int) -> tuple[Tensor, Tensor]:
    dtype = accumulator(student.dtype)
    return student.to(dtype), dequantized(target, target_scale, channel_axis, dtype)


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
