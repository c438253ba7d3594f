"""Readable arithmetic of the decoupled divergence."""

from __future__ import annotations

import torch
from stablekd_fast.kernels._checks import accumulator, laid_out_like, scaled
from torch import Tensor


def decoupled_kl(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, alpha: float, beta: float
) -> Tensor:
    """See `stablekd_fast.kernels.decoupled_kl`. Differentiable, to any order."""
    dtype = accumulator(student.dtype)
    student, teacher = student.to(dtype) / temperature, teacher.to(dtype) / temperature
    excluded = torch.isneginf(teacher)
    log_q, log_q_rest, log_q_others = _decoupled(student, labels)
    log_p, log_p_rest, log_p_others = _decoupled(teacher, labels)
    target = log_p.exp() * (log_p - log_q) + log_p_rest.exp() * (log_p_rest - log_q_rest)
    # The label's own entry and classes that the teacher excludes have p = 0 and add nothing.
    absent = excluded.scatter(1, labels[:, None], True)
    terms = log_p_others.exp() * (log_p_others.masked_fill(absent, 0.0) - log_q_others.masked_fill(absent, 0.0))
    return (temperature**2 * (alpha * target + beta * terms.sum(dim=1))).mean()


def decoupled_kl_with_grad(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    temperature: float,
    alpha: float,
    beta: float,
    factor: float,
    upstream: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The scaled loss and its gradient with respect to the student's logits, in closed form."""
    loss = decoupled_kl(student, teacher, labels, temperature, alpha, beta)
    dtype = accumulator(student.dtype)
    log_p, log_p_rest, log_p_others = _decoupled(teacher.to(dtype) / temperature, labels)
    _, _, log_q_others = _decoupled(student.to(dtype) / temperature, labels)
    q = torch.softmax(student.to(dtype) / temperature, dim=1)
    q_others, p_others = log_q_others.exp(), log_p_others.exp()
    # d TCKD/ds: q - p at the label, q - (1 - p) q' elsewhere, where q' is q over the other classes alone.
    target = (q - log_p_rest.exp()[:, None] * q_others).scatter_add(1, labels[:, None], -log_p.exp()[:, None])
    gradient = alpha * target + beta * (q_others - p_others)
    gradient = gradient * (factor * temperature / max(len(student), 1))
    return scaled(factor * loss, upstream), laid_out_like(scaled(gradient, upstream), student)


def _decoupled(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log p of the label `[N]`, log(1 - p) `[N]`, and log p over the other classes alone `[N, C]` (-inf at the
    label)."""
    others = logits.scatter(1, labels[:, None], -torch.inf)
    total, rest = torch.logsumexp(logits, dim=1), torch.logsumexp(others, dim=1)
    own = logits.gather(1, labels[:, None]).squeeze(1)
    return own - total, rest - total, others - rest[:, None]
