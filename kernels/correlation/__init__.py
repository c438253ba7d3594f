"""Correlation distance of predictions (Huang et al., DIST: arXiv 2205.10536; used again in R2KD: arXiv 2311.13934)."""

from __future__ import annotations

from torch import Tensor

from stablekd_fast.kernels._logits import check_student, check_teacher
from stablekd_fast.kernels._registry import define_loss, serve_cuda
from stablekd_fast.kernels.correlation import reference
from stablekd_fast.kernels.correlation.reference import Operands


def correlation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    inter: float = 1.0,
    intra: float = 1.0,
) -> Tensor:
    """T^2 * (inter * mean over samples of 1 - r(rows) + intra * mean over classes of 1 - r(columns)).

    `student_logits` and `teacher_logits` are `[N, C]`; r is Pearson's correlation between the student's and the
    teacher's probabilities at temperature T, along a row (a sample's classes) or a column (a class's samples). A row or
    column that does not vary has r = 0 (1e-16 under each root).

    Returns a 0-dim tensor, float64 for float64 logits and float32 otherwise, differentiable to any order with
    respect to the logits of both. Raises OperandError for shapes or settings that do not fit.
    """
    return _loss(_checked(Operands(student_logits, teacher_logits, temperature, inter, intra)))


def correlation_with_grad(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    inter: float = 1.0,
    intra: float = 1.0,
    scale: float = 1.0,
    upstream: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`scale` times `upstream` times `correlation`, and the gradient of that with respect to the student's logits.

    `upstream` is a 0-dim tensor. The gradient is `[N, C]` in the student's dtype. Nothing is recorded for autograd and
    the host never waits.
    """
    given = _checked(Operands(student_logits, teacher_logits, temperature, inter, intra))
    return _loss_with_grad(given, scale, upstream)


def _checked(given: Operands) -> Operands:
    check_student(given.student, given.temperature)
    check_teacher(given.teacher, given.student)
    return given


_loss, _loss_with_grad = define_loss(
    "correlation",
    Operands,
    reference.correlation,
    reference.correlation_with_grad,
    differentiable=("student", "teacher"),
)
serve_cuda(__name__, correlation=reference.correlation, correlation_with_grad=reference.correlation_with_grad)
