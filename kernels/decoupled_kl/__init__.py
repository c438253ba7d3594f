"""Decoupled knowledge distillation (Zhao et al., DKD: arXiv 2203.08679)."""

from __future__ import annotations

from torch import Tensor

from stablekd_fast.kernels._checks import OperandError, describe
from stablekd_fast.kernels._logits import check_labels, check_student, check_teacher
from stablekd_fast.kernels._registry import define_loss, serve_cpu, serve_cuda
from stablekd_fast.kernels.decoupled_kl import cpu_impl, reference
from stablekd_fast.kernels.decoupled_kl.reference import Operands


def decoupled_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 4.0,
    alpha: float = 1.0,
    beta: float = 8.0,
) -> Tensor:
    """T^2 * (alpha * TCKD + beta * NCKD), averaged over the batch.

    `student_logits` and `teacher_logits` are `[N, C]` with C >= 2, `labels` int64 `[N]` with values in 0..C-1. At
    temperature T, TCKD is the divergence between the two-way distributions (label, all other classes), and NCKD that
    between the distributions over the other classes alone. A class whose logit is -inf in both takes no part.

    Returns a 0-dim tensor, float64 for float64 logits and float32 otherwise. It may be differentiated twice, with
    respect to the logits of both. Raises OperandError for shapes or settings that do not fit; labels out of range
    give NaN on GPUs and an OperandError on the CPU.
    """
    return _loss(_checked(Operands(student_logits, teacher_logits, labels, temperature, alpha, beta)))


def decoupled_kl_with_grad(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 4.0,
    alpha: float = 1.0,
    beta: float = 8.0,
    scale: float = 1.0,
    upstream: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`scale` times `upstream` times `decoupled_kl`, and the gradient of that with respect to the student's logits.

    `upstream` is a 0-dim tensor, for factors that change from step to step. The gradient is `[N, C]` in the
    student's dtype. Nothing is recorded for autograd and the host never waits.
    """
    given = _checked(Operands(student_logits, teacher_logits, labels, temperature, alpha, beta))
    return _loss_with_grad(given, scale, upstream)


def _checked(given: Operands) -> Operands:
    student = given.student
    check_student(student, given.temperature)
    if student.shape[1] < 2:
        raise OperandError(f"student_logits is {describe(student)}; it must have at least two classes.")
    check_teacher(given.teacher, student)
    check_labels(given.labels, student)
    return given


_loss, _loss_with_grad = define_loss(
    "decoupled_kl",
    Operands,
    reference.decoupled_kl,
    reference.decoupled_kl_with_grad,
    differentiable=("student", "teacher"),
)
serve_cpu(decoupled_kl=cpu_impl.decoupled_kl, decoupled_kl_with_grad=cpu_impl.decoupled_kl_with_grad)
serve_cuda(__name__, decoupled_kl=reference.decoupled_kl, decoupled_kl_with_grad=reference.decoupled_kl_with_grad)
