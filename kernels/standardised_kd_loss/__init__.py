"""Distillation of standardised logits (Sun et al., CVPR 2024: arXiv 2403.01876) with optional labels."""

from __future__ import annotations

from torch import Tensor

from stablekd_fast.kernels._logits import check_labels, check_student, check_teacher
from stablekd_fast.kernels._registry import define_loss, serve_cuda
from stablekd_fast.kernels.standardised_kd_loss import reference
from stablekd_fast.kernels.standardised_kd_loss.reference import Operands


def standardised_kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 2.0,
    kl_weight: float = 1.0,
    ce_weight: float = 1.0,
) -> Tensor:
    """kl_weight * T^2 * KL(teacher || student) + ce_weight * cross entropy, averaged over the batch.

    `student_logits` and `teacher_logits` are `[N, C]`. For the KL term each row of both is brought to mean 0 and
    standard deviation 1 (the unbiased one, and 1e-7 added to it) and divided by the temperature T. The cross entropy is
    that of the student's logits as they are with `labels`, int64 `[N]` with values in 0..C-1; without them it is left
    out. Logits must be finite, and of two classes at least: otherwise there is no deviation, and all is NaN.

    Returns a 0-dim tensor, float64 for float64 logits and float32 otherwise. It may be differentiated twice, with
    respect to the logits of both. Raises OperandError for shapes or settings that do not fit; labels out of range give
    NaN on GPUs, or stop them.
    """
    given = Operands(student_logits, teacher_logits, labels, temperature, kl_weight, ce_weight)
    return _loss(_checked(given))


def standardised_kd_loss_with_grad(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 2.0,
    kl_weight: float = 1.0,
    ce_weight: float = 1.0,
    scale: float = 1.0,
    upstream: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`scale` times `upstream` times `standardised_kd_loss`, and the gradient of that with respect to the student's
    logits.

    `upstream` is a 0-dim tensor. The gradient is `[N, C]` in the student's dtype. Nothing is recorded for autograd and
    the host never waits.
    """
    given = Operands(student_logits, teacher_logits, labels, temperature, kl_weight, ce_weight)
    return _loss_with_grad(_checked(given), scale, upstream)


def _checked(given: Operands) -> Operands:
    check_student(given.student, given.temperature)
    check_teacher(given.teacher, given.student)
    if given.labels is not None:
        check_labels(given.labels, given.student)
    return given


_loss, _loss_with_grad = define_loss(
    "standardised_kd_loss",
    Operands,
    reference.standardised_kd_loss,
    reference.standardised_kd_loss_with_grad,
    differentiable=("student", "teacher"),
)
serve_cuda(
    __name__,
    standardised_kd_loss=reference.standardised_kd_loss,
    standardised_kd_loss_with_grad=reference.standardised_kd_loss_with_grad,
)
