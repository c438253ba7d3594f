"""Readable arithmetic of the decoupled divergence."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stablekd_fast.kernels._checks import accumulator, laid_out_like, scaled


class Operands(NamedTuple):
    """The operands of `decoupled_kl`, in the order of its schema."""

    student: Tensor  # [N, C]
    teacher: Tensor  # [N, C]
    labels: Tensor  # int64 [N]
    temperature: float
    alpha: float
    beta: float


def decoupled_kl(given: Operands) -> Tensor:
    """See `stablekd_fast.kernels.decoupled_kl`. Differentiable, to any order."""
    student, teacher = _warmed(given)
    excluded = torch.isneginf(teacher)
    log_q, log_q_rest, log_q_others = _decoupled(student, given.labels)
    log_p, log_p_rest, log_p_others = _decoupled(teacher, given.labels)
    target = log_p.exp() * (log_p - log_q) + log_p_rest.exp() * (log_p_rest - log_q_rest)
    # The label's own entry and classes that the teacher excludes have p = 0 and add nothing.
    absent = excluded.scatter(1, given.labels[:, None], True)
    terms = log_p_others.exp() * (log_p_others.masked_fill(absent, 0.0) - log_q_others.masked_fill(absent, 0.0))
    return (given.temperature**2 * (given.alpha * target + given.beta * terms.sum(dim=1))).mean()


def decoupled_kl_with_grad(given: Operands, factor: float, upstream: Tensor | None) -> tuple[Tensor, Tensor]:
    """The scaled loss and its gradient with respect to the student's logits, in closed form."""
    student, teacher = _warmed(given)
    labels = given.labels[:, None]
    log_p, log_p_rest, log_p_others = _decoupled(teacher, given.labels)
    _, _, log_q_others = _decoupled(student, given.labels)
    q = torch.softmax(student, dim=1)
    q_others, p_others = log_q_others.exp(), log_p_others.exp()
    # d TCKD/ds: q - p at the label, q - (1 - p) q' elsewhere, where q' is q over the other classes alone.
    target = (q - log_p_rest.exp()[:, None] * q_others).scatter_add(1, labels, -log_p.exp()[:, None])
    gradient = given.alpha * target + given.beta * (q_others - p_others)
    gradient = gradient * (factor * given.temperature / max(len(student), 1))
    return scaled(factor * decoupled_kl(given), upstream), laid_out_like(scaled(gradient, upstream), given.student)


def _warmed(given: Operands) -> tuple[Tensor, Tensor]:
    """Student's and teacher's logits over the temperature, in the dtype that is computed in."""
    dtype = accumulator(given.student.dtype)
    return given.student.to(dtype) / given.temperature, given.teacher.to(dtype) / given.temperature


def _decoupled(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return log p of the label `[N]`, log(1 - p) `[N]`, and log p over the other classes alone `[N, C]`.

    The last is -inf at the label.
    """
    others = logits.scatter(1, labels[:, None], -torch.inf)
    total, rest = torch.logsumexp(logits, dim=1), torch.logsumexp(others, dim=1)
    own = logits.gather(1, labels[:, None]).squeeze(1)
    return own - total, rest - total, others - rest[:, None]
