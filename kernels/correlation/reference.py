"""Readable arithmetic of the correlation distance."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stablekd_fast.kernels._checks import accumulator, laid_out_like, scaled

VARIANCE_EPSILON = 1e-16


class Operands(NamedTuple):
    """The operands of `correlation`, in the order of its schema."""

    student: Tensor  # [N, C]
    teacher: Tensor  # [N, C]
    temperature: float
    inter: float
    intra: float


class Compared(NamedTuple):
    """Probabilities of student and teacher less their means along an axis, their lengths along it, and Pearson's
    correlation. The axis keeps its place, with size 1."""

    q: Tensor  # [N, C]
    p: Tensor  # [N, C]
    q_length: Tensor
    p_length: Tensor
    correlation: Tensor


def correlation(given: Operands) -> Tensor:
    """See `stablekd_fast.kernels.correlation`. Differentiable, to any order."""
    return _weighted(given, *(1 - along.correlation.mean() for along in _along_both(*_probabilities(given))))


def correlation_with_grad(given: Operands, factor: float, upstream: Tensor | None) -> tuple[Tensor, Tensor]:
    """The scaled loss and its gradient with respect to the student's logits, in closed form."""
    q, p = _probabilities(given)
    both = _along_both(q, p)
    loss = _weighted(given, *(1 - along.correlation.mean() for along in both))
    slope = _weighted(given, *map(_slope, both))
    gradient = q * (slope - (q * slope).sum(dim=1, keepdim=True)) * (factor / given.temperature)
    return scaled(factor * loss, upstream), laid_out_like(scaled(gradient, upstream), given.student)


def _probabilities(given: Operands) -> tuple[Tensor, Tensor]:
    dtype = accumulator(given.student.dtype)
    q, p = (torch.softmax(logits.to(dtype) / given.temperature, dim=1) for logits in (given.student, given.teacher))
    return q, p


def _weighted(given: Operands, rows: Tensor, columns: Tensor) -> Tensor:
    return given.temperature**2 * (given.inter * rows + given.intra * columns)


def _along_both(q: Tensor, p: Tensor) -> tuple[Compared, Compared]:
    """Compare along rows, then along columns."""
    return _compared(q, p, 1), _compared(q, p, 0)


def _compared(q: Tensor, p: Tensor, axis: int) -> Compared:
    q, p = (values - values.mean(dim=axis, keepdim=True) for values in (q, p))
    a, b = ((values.square().sum(dim=axis, keepdim=True) + VARIANCE_EPSILON).sqrt() for values in (q, p))
    return Compared(q, p, a, b, (q * p).sum(dim=axis, keepdim=True) / (a * b))


def _slope(along: Compared) -> Tensor:
    """The derivative of 1 - correlation, averaged, with respect to the student's probabilities, `[N, C]`. That of the
    mean adds nothing, as `q` and `p` sum to 0."""
    q, p, a, b, r = along
    return (r * q / a.square() - p / (a * b)) / max(r.numel(), 1)
