"""Readable arithmetic of the distillation loss."""

from __future__ import annotations

import torch
from torch import Tensor

from stablekd_fast.kernels._checks import accumulator, laid_out_like


def kd_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    temperature: float,
    alpha: float,
    label_smoothing: float,
    weight: Tensor | None,
) -> Tensor:
    """See `stablekd_fast.kernels.kd_loss`. Differentiable, to any order."""
    student, teacher, masked = _prepare(student, teacher)
    log_q = torch.log_softmax(student / temperature, dim=1).masked_fill(masked, 0.0)
    log_p = torch.log_softmax(teacher / temperature, dim=1)
    # A class the teacher excludes has p = 0 and adds nothing, though log p is -inf.
    excluded = torch.isneginf(teacher)
    terms = log_p.exp() * (log_p.masked_fill(excluded, 0.0) - log_q).masked_fill(excluded, 0.0)
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
    labels: Tensor | None,
    temperature: float,
    alpha: float,
    label_smoothing: float,
    weight: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The scaled loss and its gradient with respect to the student's logits, in closed form."""
    loss = scale * kd_loss(student, teacher, labels, temperature, alpha, label_smoothing, weight)
    logits, teacher_logits, masked = _prepare(student, teacher)
    # d(T^2 KL)/ds = T (q - p), where q and p are taken at temperature T.
    gradient = temperature * (
        torch.softmax(logits / temperature, dim=1) - torch.softmax(teacher_logits / temperature, dim=1)
    )
    if labels is not None:
        targets = torch.zeros_like(logits)
        if label_smoothing > 0:
            targets += (label_smoothing / _open_classes(masked))[:, None]
            targets.masked_fill_(masked, 0.0)
        targets.scatter_add_(1, labels[:, None], torch.full_like(logits[:, :1], 1 - label_smoothing))
        gradient = alpha * gradient + (1 - alpha) * (torch.softmax(logits, dim=1) - targets)
    gradient = _weighted(gradient, weight) * (scale / max(len(logits), 1))
    return loss, laid_out_like(gradient, student)


def _prepare(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both logits in the accumulator's dtype, and which classes are masked: -inf in both."""
    dtype = accumulator(student.dtype)
    return student.to(dtype), teacher.to(dtype), torch.isneginf(student) & torch.isneginf(teacher)


def _open_classes(masked: Tensor) -> Tensor:
    return (~masked).sum(dim=1)


def _weighted(values: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        return values
    return values * weight.to(values.dtype).view(-1, *[1] * (values.dim() - 1))
