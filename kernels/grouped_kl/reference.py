"""Readable arithmetic of the grouped divergence."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stablekd_fast.kernels._checks import accumulator, laid_out_like, scaled


class Operands(NamedTuple):
    """The operands of `grouped_kl`, in the order of its schema."""

    student: Tensor  # [N, C]
    teacher: Tensor  # [N, C]
    temperature: float
    threshold: float
    primary_weight: float
    binary_weight: float


class Groups(NamedTuple):
    """A row's classes in two groups, and logarithms of the masses of all, of the primary and of the secondary group,
    `[N]` each."""

    student: Tensor  # logits over the temperature, [N, C]
    teacher: Tensor
    inside: Tensor  # the primary group, bool [N, C]
    outside: Tensor  # the secondary group; a class that is -inf in both is in neither
    log_q: list[Tensor]
    log_p: list[Tensor]


def grouped_kl(given: Operands) -> Tensor:
    """See `stablekd_fast.kernels.grouped_kl`. Differentiable, to any order."""
    binary, primary, _, mass = split(given.student, given.teacher, given.temperature, given.threshold)
    return (given.temperature**2 * (given.binary_weight * binary + given.primary_weight * mass * primary)).mean()


def grouped_kl_with_grad(given: Operands, factor: float, upstream: Tensor | None) -> tuple[Tensor, Tensor]:
    """The scaled loss and its gradient with respect to the student's logits, in closed form."""
    groups = _groups(given.student, given.teacher, given.temperature, given.threshold)
    q = [
        torch.exp(groups.student - log_q[:, None]).where(group, 0.0)
        for log_q, group in zip(groups.log_q[1:], (groups.inside, groups.outside))
    ]
    p = torch.exp(groups.teacher - groups.log_p[0][:, None]).where(groups.inside, 0.0)
    p_in, q_in = (log[1] - log[0] for log in (groups.log_p, groups.log_q))
    # With the softmaxes q' inside the groups: d KL_binary/ds is (Q - P) q' in the primary group, (P - Q) q' outside;
    # d (P KL_primary)/ds is P q' - p.
    ahead, mass = (q_in.exp() - p_in.exp())[:, None], p_in.exp()[:, None]
    gradient = given.binary_weight * ahead * (q[0] - q[1]) + given.primary_weight * (mass * q[0] - p)
    gradient = gradient * (factor * given.temperature / max(len(gradient), 1))
    return scaled(factor * grouped_kl(given), upstream), laid_out_like(scaled(gradient, upstream), given.student)


def split(
    student: Tensor, teacher: Tensor, temperature: float, threshold: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """KL_binary, KL_primary, KL_secondary, and the teacher's mass of the primary group, each `[N]`."""
    groups = _groups(student, teacher, temperature, threshold)
    inner = [
        _divergence(groups.student, groups.teacher, groups.log_q[place], groups.log_p[place], group)
        for place, group in ((1, groups.inside), (2, groups.outside))
    ]
    masses = [(groups.log_p[place] - groups.log_p[0], groups.log_q[place] - groups.log_q[0]) for place in (1, 2)]
    binary = _weighted(*masses[0]) + _weighted(*masses[1])
    return binary, inner[0], inner[1], masses[0][0].exp()


def _groups(student: Tensor, teacher: Tensor, temperature: float, threshold: float) -> Groups:
    dtype = accumulator(student.dtype)
    # A class that is -inf in both has p = q = 0; any finite logit so low leaves the sums as they are.
    masked = torch.isneginf(student) & torch.isneginf(teacher)
    primary = _primary(teacher.to(dtype), temperature, threshold)
    student, teacher = (tensor.to(dtype).masked_fill(masked, 0.0) / temperature for tensor in (student, teacher))
    inside, outside = primary & ~masked, ~primary & ~masked
    log_q, log_p = ([_log_mass(logits, group) for group in (~masked, inside, outside)] for logits in (student, teacher))
    return Groups(student, teacher, inside, outside, log_q, log_p)


def _primary(teacher: Tensor, temperature: float, threshold: float) -> Tensor:
    """The smallest set of most probable classes whose mass reaches the threshold, `[N, C]`, never empty. Of classes
    with equal logits the first ones are taken."""
    classes = teacher.argsort(dim=1, descending=True, stable=True)
    ordered = torch.softmax(teacher / temperature, dim=1).gather(1, classes)
    before = ordered.cumsum(dim=1) - ordered
    return torch.zeros_like(teacher, dtype=torch.bool).scatter(1, classes, before < threshold)


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
