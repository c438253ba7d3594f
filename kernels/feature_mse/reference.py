"""Readable arithmetic of the feature losses."""

from __future__ import annotations

import torch
from torch import Tensor

from stablekd_fast.kernels._checks import accumulator, laid_out_like

POWER_FLOOR = 1e-12
CHANNEL_EPSILON = 1e-5
LENGTH_EPSILON = 1e-12


def feature_mse(
    student: Tensor, target: Tensor, normalize: str | None, scale: Tensor | None, channel_axis: int
) -> Tensor:
    """See `stablekd_fast.kernels.feature_mse`. Differentiable, to any order."""
    dtype = accumulator(student.dtype)
    student, target = student.to(dtype), target.to(dtype)
    if normalize == "l2":
        return (_unit(student)[0] - _unit(target)[0]).square().sum() / max(len(student), 1)
    squares = (student - target).square()
    if normalize == "channel":
        squares = squares / _channel_variance(target, channel_axis)
    loss = squares.mean()
    return loss / _power(target, scale) if normalize == "power" else loss


def feature_mse_with_grad(
    student: Tensor,
    target: Tensor,
    normalize: str | None,
    scale: Tensor | None,
    channel_axis: int,
    weight: float,
) -> tuple[Tensor, Tensor]:
    """The weighted loss and its gradient with respect to the student, in closed form."""
    dtype = accumulator(student.dtype)
    wide, wide_target = student.to(dtype), target.to(dtype)
    if normalize == "l2":
        loss = feature_mse(student, target, normalize, scale, channel_axis)
        gradient = _l2_gradient(wide, wide_target) * (weight / max(len(wide), 1))
    else:
        difference = wide - wide_target
        factor = 2 * weight / max(wide.numel(), 1)
        if normalize == "channel":
            pull = difference / _channel_variance(wide_target, channel_axis)
            loss, gradient = difference.mul_(pull).mean(), pull.mul_(factor)
        else:
            power = _power(wide_target, scale) if normalize == "power" else 1
            loss, gradient = difference.square().mean() / power, difference.mul_(factor / power)
    return weight * loss, laid_out_like(gradient, student)


def _power(target: Tensor, scale: Tensor | None) -> Tensor:
    power = target.square().mean() if scale is None else scale.to(target.dtype)
    return power.clamp_min(POWER_FLOOR)


def _channel_variance(target: Tensor, channel_axis: int) -> Tensor:
    """Population variance of each channel over everything else, with the epsilon usual in batch norm."""
    others = [axis for axis in range(target.dim()) if axis != channel_axis % target.dim()]
    return target.var(dim=others, correction=0, keepdim=True) + CHANNEL_EPSILON


def _unit(features: Tensor) -> tuple[Tensor, Tensor]:
    """Each sample scaled to unit length, and the lengths; the epsilon keeps an all-zero sample at zero."""
    samples = list(range(1, features.dim()))
    length = (features.square().sum(dim=samples, keepdim=True) + LENGTH_EPSILON).sqrt()
    return features / length, length


def _l2_gradient(student: Tensor, target: Tensor) -> Tensor:
    """With u = s / |s| the gradient of |u - v|^2 is the part of 2 (u - v) that is orthogonal to u, over |s|."""
    unit, length = _unit(student)
    pull = 2 * (unit - _unit(target)[0])
    along = (unit * pull).sum(dim=list(range(1, student.dim())), keepdim=True)
    return (pull - unit * along) / length
