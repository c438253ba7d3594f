"""Readable arithmetic of the distillation loss."""

from __future__ import annotations

import torch
from stablekd_fast.kernels._checks import accumulator, laid_out_like, scaled
from torch import Tensor


def kd_loss(
    student: Tensor,
    teacher: Tensor,
    indices: Tensor | None,
    labels: Tensor | None,
    temperature: float,
    alpha: float,
    label_smoothing: float,
    weight: Tensor | None,
) -> Tensor:
    """See `stablekd_fast.kernels.kd_loss`. Differentiable, to any order."""
    student, teacher = (tensor.to(accumulator(student.dtype)) for tensor in (student, teacher))
    p, log_p, masked = _teacher_distribution(student, teacher, indices, temperature)
    log_q = torch.log_softmax(student / temperature, dim=1).masked_fill(masked, 0.0)
    # A class the teacher excludes has p = 0 and adds nothing, though log p is -inf.
    excluded = torch.isneginf(log_p)
    terms = p * (log_p.masked_fill(excluded, 0.0) - log_q).masked_fill(excluded, 0.0)
    samples = temperature**2 * terms.sum(dim=1)
    if labels is not None:
        log_probabilities = torch.log_softmax(student, dim=1)
        cross_entropy = -log_probabilities.gather(1, labels[:, None]).squeeze(1)
        if label_smoothing > 0:
            uniform = -log_probabilities.masked_fill(masked, 0.0).sum(dim=1) / _open_classes(masked)
            cross_entropy = (1 - label_smoothing) * cross_entropy + label_smoothing * uniform
        samples = alpha * samples + (1 - alpha) * cross_entropy
    return _weighted(samples, weight).mean()


def kd_loss_with_grad(
    student: Tensor,
    teacher: Tensor,
    indices: Tensor | None,
    labels: Tensor | None,
    temperature: float,
    alpha: float,
    label_smoothing: float,
    weight: Tensor | None,
    factor: float,
    upstream: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The scaled loss and its gradient with respect to the student's logits, in closed form."""
    loss = kd_loss(student, teacher, indices, labels, temperature, alpha, label_smoothing, weight)
    logits, wide_teacher = (tensor.to(accumulator(student.dtype)) for tensor in (student, teacher))
    p, _, masked = _teacher_distribution(logits, wide_teacher, indices, temperature)
    # d(T^2 KL)/ds = T (q - p), where q and p are taken at temperature T. Kept probabilities may not quite sum to 1.
    q = torch.softmax(logits / temperature, dim=1)
    gradient = temperature * (q * p.sum(dim=1, keepdim=True) - p)
    if labels is not None:
        targets = torch.zeros_like(logits)
        if label_smoothing > 0:
            # Converted first: a number over int64 is float32.
            targets += (label_smoothing / _open_classes(masked).to(logits.dtype))[:, None]
            targets.masked_fill_(masked, 0.0)
        targets.scatter_add_(1, labels[:, None], torch.full_like(logits[:, :1], 1 - label_smoothing))
        gradient = alpha * gradient + (1 - alpha) * (torch.softmax(logits, dim=1) - targets)
    gradient = _weighted(gradient, weight) * (factor / max(len(logits), 1))
    return scaled(factor * loss, upstream), laid_out_like(scaled(gradient, upstream), student)


def _teacher_distribution(
    student: Tensor, teacher: Tensor, indices: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """p, log p, and which classes take no part at all, each `[N, C]`."""
    if indices is None:
        log_p = torch.log_softmax(teacher / temperature, dim=1)
        return log_p.exp(), log_p, torch.isneginf(student) & torch.isneginf(teacher)
    named = torch.zeros_like(student, dtype=torch.bool).scatter(1, indices, True)
    masked = torch.isneginf(student) & ~named
    others = ~(named | masked)
    rest = (1 - teacher.sum(dim=1, keepdim=True)).clamp_min(0.0) / others.sum(dim=1, keepdim=True).clamp_min(1)
    p = torch.zeros_like(student).scatter(1, indices, teacher) + rest * others
    return p, torch.where(p > 0, p, 1.0).log().masked_fill(p <= 0, -torch.inf), masked


def _open_classes(masked: Tensor) -> Tensor:
    return (~masked).sum(dim=1)


def _weighted(values: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        return values
    return values * weight.to(values.dtype).view(-1, *[1] * (values.dim() - 1))
