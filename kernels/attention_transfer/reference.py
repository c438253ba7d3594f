"""Readable arithmetic of attention transfer."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from stablekd_fast.kernels._checks import accumulator, laid_out_like, scaled
from stablekd_fast.kernels._features import length


class Operands(NamedTuple):
    """The operands of `attention_transfer`, in the order of its schema."""

    student: Tensor  # [N, C, H, W]
    target: Tensor  # [N, D, H, W]
    power: float


def attention_transfer(given: Operands) -> Tensor:
    """See `stablekd_fast.kernels.attention_transfer`. Differentiable, to any order where |x|^power is."""
    dtype = accumulator(given.student.dtype)
    maps = (_attention(features.to(dtype), given.power) for features in (given.student, given.target))
    own, other = (attention / length(attention, [1]) for attention in maps)
    return (own - other).square().mean()


def attention_transfer_with_grad(given: Operands, factor: float, upstream: Tensor | None) -> tuple[Tensor, Tensor]:
    """The scaled loss and its gradient with respect to the student, in closed form."""
    dtype, power = accumulator(given.student.dtype), given.power
    student, target = given.student.to(dtype), given.target.to(dtype)
    own, other = _attention(student, power), _attention(target, power)
    lengths = length(own, [1])
    # With u = a / |a|, v = b / |b|: d|u - v|^2 / da is 2 ((u - v) - u (u.(u - v))) / |a|.
    apart = own - other * (lengths / length(other, [1]))
    along = (own * apart).sum(1, keepdim=True) / lengths.square()
    pull = (apart - own * along) / lengths.square()
    steepness = 2 * student if power == 2 else power * student.abs().pow(power - 1) * student.sign()
    step = 2 * factor / max(own.numel(), 1) / max(student.shape[1], 1)
    gradient = steepness * (pull * step).reshape(len(own), 1, *student.shape[2:])
    return scaled(factor * attention_transfer(given), upstream), laid_out_like(
        scaled(gradient, upstream), given.student
    )


def _attention(features: Tensor, power: float) -> Tensor:
    """`[N, H * W]`, the mean of |x|^power over the channels."""
    magnitude = features.square() if power == 2 else features.abs().pow(power)
    return magnitude.mean(dim=1).flatten(1)
