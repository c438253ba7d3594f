"""Readable arithmetic of the distillation loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stablekd_fast.kernels._checks import accumulator, laid_out_like, scaled


class Operands(NamedTuple):
    """The operands of `kd_loss`, in the order of its schema."""

    student: Tensor  # [N, C]
    teacher: Tensor  # [N, C] logits; with indices [N, k] probabilities
    indices: Tensor | None  # int64 [N, k]
    labels: Tensor | None  # int64 [N]
    temperature: float
    alpha: float
    label_smoothing: float
    weight: Tensor | None  # [N]


def kd_loss(given: Operands) -> Tensor:
    """See `stablekd_fast.kernels.kd_loss`. Differentiable, to any order."""
    student, teacher = _widened(given)
    p, log_p, masked = _teacher_distribution(student, teacher, given.indices, given.temperature)
    log_q = torch.log_softmax(student / given.temperature, dim=1).masked_fill(masked, 0.0)
    # A class the teacher excludes has p = 0 and adds nothing, though log p is -inf.
    excluded = torch.isneginf(log_p)
    terms = p * (log_p.masked_fill(excluded, 0.0) - log_q).masked_fill(excluded, 0.0)
    samples = given.temperature**2 * terms.sum(dim=1)
    if given.labels is not None:
        log_probabilities = torch.log_softmax(student, dim=1)
        cross_entropy = -log_probabilities.gather(1, given.labels[:, None]).squeeze(1)
        smoothing = given.label_smoothing
        if smoothing > 0:
            uniform = -log_probabilities.masked_fill(masked, 0.0).sum(dim=1) / _open_classes(masked)
            cross_entropy = (1 - smoothing) * cross_entropy + smoothing * uniform
        samples = given.alpha * samples + (1 - given.alpha) * cross_entropy
    return _weighted(samples, given.weight).mean()


def kd_loss_with_grad(given: Operands, factor: float, upstream: Tensor | None) -> tuple[Tensor, Tensor]:
    """The scaled loss and its gradient with respect to the student's logits, in closed form."""
    student, teacher = _widened(given)
    p, _, masked = _teacher_distribution(student, teacher, given.indices, given.temperature)
    # d(T^2 KL)/ds = T (q - p), where q and p are taken at temperature T. Kept probabilities may not quite sum to 1.
    q = torch.softmax(student / given.temperature, dim=1)
    gradient = given.temperature * (q * p.sum(dim=1, keepdim=True) - p)
    if given.labels is not None:
        targets = torch.zeros_like(student)
        smoothing = given.label_smoothing
        if smoothing > 0:
            # Converted first: a number over int64 is float32.
            targets += (smoothing / _open_classes(masked).to(student.dtype))[:, None]
            targets.masked_fill_(masked, 0.0)
        targets.scatter_add_(1, given.labels[:, None], torch.full_like(student[:, :1], 1 - smoothing))
        gradient = given.alpha * gradient + (1 - given.alpha) * (torch.softmax(student, dim=1) - targets)
    gradient = _weighted(gradient, given.weight) * (factor / max(len(student), 1))
    return scaled(factor * kd_loss(given), upstream), laid_out_like(scaled(gradient, upstream), given.student)


def _widened(given: Operands) -> tuple[Tensor, Tensor]:
    """Student and teacher in the dtype that is computed in."""
    dtype = accumulator(given.student.dtype)
    return given.student.to(dtype), given.teacher.to(dtype)


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
