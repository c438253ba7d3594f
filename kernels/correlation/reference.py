"""Readable arithmetic of the correlation distance."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stablekd_fast.kernels._checks import accumulator

VARIANCE_EPSILON = 1e-16


class Operands(NamedTuple):
    """The operands of `correlation`."""

    student: Tensor  # [N, C]
    teacher: Tensor  # [N, C]
    temperature: float
    inter: float
    intra: float


def correlation(given: Operands) -> Tensor:
    dtype = accumulator(given.student.dtype)
    q, p = (torch.softmax(logits.to(dtype) / given.temperature, dim=1) for logits in (given.student, given.teacher))
    return given.temperature**2 * (given.inter * _distance(q, p, 1) + given.intra * _distance(q, p, 0))


def _distance(q: Tensor, p: Tensor, axis: int) -> Tensor:
    """1 - Pearson's correlation along `axis`, averaged over the other one."""
    q, p = (values - values.mean(dim=axis, keepdim=True) for values in (q, p))
    lengths = [(values.square().sum(dim=axis) + VARIANCE_EPSILON).sqrt() for values in (q, p)]
    return 1 - ((q * p).sum(dim=axis) / (lengths[0] * lengths[1])).mean()
