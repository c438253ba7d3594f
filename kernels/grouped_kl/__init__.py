"""Grouped knowledge distillation (Zhao et al., AAAI 2023: arXiv 2304.04462)."""

from __future__ import annotations

from torch import Tensor

from stablekd_fast.kernels._checks import OperandError
from stablekd_fast.kernels._logits import check_student, check_teacher
from stablekd_fast.kernels._registry import define_loss, serve_cpu, serve_cuda
from stablekd_fast.kernels.grouped_kl import cpu_impl, reference
from stablekd_fast.kernels.grouped_kl.reference import Operands


def grouped_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 4.0,
    threshold: float = 0.9,
    primary_weight: float = 1.0,
    binary_weight: float = 1.0,
) -> Tensor:
    """T^2 * (binary_weight * KL_binary + primary_weight * P * KL_primary), averaged over the batch.

    `student_logits` and `teacher_logits` are `[N, C]`. In each row the primary group holds the classes that are most
    probable for the teacher at temperature T, just as many as reach the probability `threshold` together, of equal ones
    the first; the others are the secondary group. The divergence splits exactly into KL_binary, between the two groups'
    masses, P * KL_primary and (1 - P) * KL_secondary, between the distributions inside the groups, P being the
    teacher's mass of the primary group. The secondary term, which the authors found to hold training back, is dropped.
    A class whose logit is -inf in both takes no part.

    Returns a 0-dim tensor, float64 for float64 logits and float32 otherwise. It may be differentiated twice, with
    respect to the logits of both; the groups are constants to derivatives. Raises OperandError for shapes or settings
    that do not fit.
    """
    given = Operands(student_logits, teacher_logits, temperature, threshold, primary_weight, binary_weight)
    return _loss(_checked(given))


def grouped_kl_with_grad(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 4.0,
    threshold: float = 0.9,
    primary_weight: float = 1.0,
    binary_weight: float = 1.0,
    scale: float = 1.0,
    upstream: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`scale` times `upstream` times `grouped_kl`, and the gradient of that with respect to the student's logits.

    `upstream` is a 0-dim tensor. The gradient is `[N, C]` in the student's dtype. Nothing is recorded for autograd and
    the host never waits.
    """
    given = Operands(student_logits, teacher_logits, temperature, threshold, primary_weight, binary_weight)
    return _loss_with_grad(_checked(given), scale, upstream)


def _checked(given: Operands) -> Operands:
    check_student(given.student, given.temperature)
    check_teacher(given.teacher, given.student)
    if not 0 < given.threshold < 1:
        raise OperandError(f"threshold={given.threshold} was given; it must be between 0 and 1.")
    return given


_loss, _loss_with_grad = define_loss(
    "grouped_kl",
    Operands,
    reference.grouped_kl,
    reference.grouped_kl_with_grad,
    differentiable=("student", "teacher"),
)
serve_cpu(grouped_kl=cpu_impl.grouped_kl, grouped_kl_with_grad=cpu_impl.grouped_kl_with_grad)
serve_cuda(__name__, grouped_kl=reference.grouped_kl, grouped_kl_with_grad=reference.grouped_kl_with_grad)
