"""Readable arithmetic of the grouped divergence."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stablekd_fast.kernels._checks import accumulator


class Operands(NamedTuple):
    """The operands of `grouped_kl`."""

    student: Tensor  # [N, C]
    teacher: Tensor  # [N, C]
    temperature: float
    threshold: float
    primary_weight: float
    binary_weight: float


def grouped_kl(given: Operands) -> Tensor:
    binary, primary, _, mass = split(given.student, given.teacher, given.temperature, given.threshold)
    return (given.temperature**2 * (given.binary_weight * binary + given.primary_weight * mass * primary)).mean()


def split(
    student: Tensor, teacher: Tensor, temperature: float, threshold: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """KL_binary, KL_primary, KL_secondary, and the teacher's mass of the primary group, each `[N]`."""
    dtype = accumulator(student.dtype)
    # A class that is -inf in both has p = q = 0; any finite logit so low leaves the sums as they are.
    masked = torch.isneginf(student) & torch.isneginf(teacher)
    student, teacher = (tensor.to(dtype).masked_fill(masked, 0.0) / temperature for tensor in (student, teacher))
    open_ = ~masked
    inside = _primary(torch.softmax(teacher.masked_fill(masked, -torch.inf), dim=1), threshold)
    log_q, log_p = (
        [_log_mass(logits, group & open_) for group in (open_, inside, ~inside)] for logits in (student, teacher)
    )
    groups = [
        _divergence(student, teacher, log_q[place], log_p[place], group & open_)
        for place, group in ((1, inside), (2, ~inside))
    ]
    masses = [(log_p[place] - log_p[0], log_q[place] - log_q[0]) for place in (1, 2)]
    binary = _weighted(*masses[0]) + _weighted(*masses[1])
    return binary, groups[0], groups[1], masses[0][0].exp()


def _primary(p: Tensor, threshold: float) -> Tensor:
    """The smallest set of most probable classes whose mass reaches the threshold, `[N, C]`, never empty."""
    ordered, classes = p.sort(dim=1, descending=True)
    before = ordered.cumsum(dim=1) - ordered
    return torch.zeros_like(p, dtype=torch.bool).scatter(1, classes, before < threshold)


def _log_mass(logits: Tensor, group: Tensor) -> Tensor:
    """Logarithm of the sum of exponentials over a group; very low, not -inf, for an empty one, as gradients need."""
    lowest = torch.finfo(logits.dtype).min / 4
    return torch.logsumexp(logits.masked_fill(~group, lowest), dim=1)


def _divergence(student: Tensor, teacher: Tensor, log_q: Tensor, log_p: Tensor, group: Tensor) -> Tensor:
    """KL between the distributions inside a group."""
    excluded = torch.isneginf(teacher) | ~group
    a = (student - log_q[:, None]).masked_fill(excluded, 0.0)
    b = (teacher - log_p[:, None]).masked_fill(excluded, 0.0)
    return (b.exp() * (b - a)).masked_fill(excluded, 0.0).sum(dim=1)


def _weighted(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p (log p - log q), 0 where p is 0."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0)
