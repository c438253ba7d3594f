"""Readable arithmetic of the distillation of standardised logits."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from stablekd_fast.kernels._checks import accumulator, laid_out_like, scaled
from stablekd_fast.kernels.kd_loss import reference as kd

DEVIATION_EPSILON = 1e-7


class Operands(NamedTuple):
    """The operands of `standardised_kd_loss`, in the order of its schema."""

    student: Tensor  # [N, C]
    teacher: Tensor  # [N, C]
    labels: Tensor | None  # int64 [N]
    temperature: float
    kl_weight: float
    ce_weight: float


def standardised_kd_loss(given: Operands) -> Tensor:
    """See `stablekd_fast.kernels.standardised_kd_loss`. Differentiable, to any order."""
    student, teacher = _widened(given)
    loss = given.kl_weight * kd.kd_loss(_divergence(given, _standardised(student), _standardised(teacher)))
    if given.labels is not None:
        loss = loss + given.ce_weight * kd.kd_loss(_cross_entropy(student, given.labels))
    return loss


def standardised_kd_loss_with_grad(given: Operands, factor: float, upstream: Tensor | None) -> tuple[Tensor, Tensor]:
    """The scaled loss and its gradient with respect to the student's logits, in closed form."""
    student, teacher = _widened(given)
    z = _standardised(student)
    loss, slope = kd.kd_loss_with_grad(_divergence(given, z, _standardised(teacher)), factor * given.kl_weight, None)
    # With z = (s - mean) / d and d = deviation + epsilon: ds = (dz - mean(dz) - (s - mean) * moved) / d, where the
    # deviation's own derivative is (s - mean) / ((C - 1) * deviation), and nothing where that is 0.
    deviation = student.std(dim=1, keepdim=True)
    moved = (slope * z).sum(dim=1, keepdim=True) / ((student.shape[1] - 1) * deviation)
    apart = student - student.mean(dim=1, keepdim=True)
    moved = moved.masked_fill(deviation == 0, 0.0)
    gradient = (slope - slope.mean(dim=1, keepdim=True) - apart * moved) / (deviation + DEVIATION_EPSILON)
    if given.labels is not None:
        hard, hard_slope = kd.kd_loss_with_grad(_cross_entropy(student, given.labels), factor * given.ce_weight, None)
        loss, gradient = loss + hard, gradient + hard_slope
    return scaled(loss, upstream), laid_out_like(scaled(gradient, upstream), given.student)


def _widened(given: Operands) -> tuple[Tensor, Tensor]:
    """Student and teacher in the dtype that is computed in."""
    dtype = accumulator(given.student.dtype)
    return given.student.to(dtype), given.teacher.to(dtype)


def _standardised(logits: Tensor) -> Tensor:
    """Logits `[N, C]` with mean 0 and (unbiased) standard deviation 1 in each row."""
    return (logits - logits.mean(dim=1, keepdim=True)) / (logits.std(dim=1, keepdim=True) + DEVIATION_EPSILON)


def _divergence(given: Operands, student: Tensor, teacher: Tensor) -> kd.Operands:
    return kd.Operands(student, teacher, None, None, given.temperature, 1.0, 0.0, None)


def _cross_entropy(student: Tensor, labels: Tensor) -> kd.Operands:
    """The student is its own teacher, of weight 0: what is left is the cross entropy."""
    return kd.Operands(student, student, None, labels, 1.0, 0.0, 0.0, None)
