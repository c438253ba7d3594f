"""Knowledge distillation of logits with optional labels (Hinton, Vinyals, Dean: arXiv 1503.02531)."""

from __future__ import annotations

import torch
from torch import Tensor

from stablekd_fast.kernels._checks import OperandError, describe
from stablekd_fast.kernels._logits import check_labels, check_student, check_teacher
from stablekd_fast.kernels._registry import define_loss, serve_cpu, serve_cuda
from stablekd_fast.kernels.kd_loss import cpu_impl, reference
from stablekd_fast.kernels.kd_loss.reference import Operands

TopK = tuple[Tensor, Tensor]
"""A teacher's largest probabilities at the temperature in use: class `indices` int64 `[N, k]`, and `[N, k]` values."""


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | TopK,
    labels: Tensor | None = None,
    *,
    temperature: float = 4.0,
    alpha: float = 0.9,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
) -> Tensor:
    """alpha * T^2 * KL(teacher || student) + (1 - alpha) * cross entropy, averaged over the batch.

    A class whose logit is -inf in both takes no part, in label smoothing neither.

    Args:
        student_logits: `[N, C]`.
        teacher_logits: `[N, C]`, or `(indices, probabilities)` of the teacher's k most probable classes, both
            `[N, k]`, at temperature T; a row names no class twice. What they lack to 1 is spread evenly over the
            classes that are neither among them nor -inf in the student (marginal smoothing, Shen and Xing:
            arXiv 2112.01528).
        labels: int64 `[N]` with values in 0..C-1. Without them the KL term stands alone, with alpha = 1.
        temperature: T, of both distributions of the KL term. The cross entropy is taken at 1.
        alpha: the weight of the KL term.
        label_smoothing: the part of a label that is spread evenly over all classes.
        weight: `[N]`, multiplies each sample's term; the mean stays over N.

    Returns a 0-dim tensor, float64 for float64 logits and float32 otherwise. It may be differentiated twice, with
    respect to the student's logits, what the teacher gave (logits or probabilities) and the weight. Raises
    OperandError for shapes or settings that do not fit; labels and indices out of range give NaN on GPUs and an
    OperandError on the CPU.
    """
    teacher = _teacher(teacher_logits)
    return _loss(_checked(Operands(student_logits, *teacher, labels, temperature, alpha, label_smoothing, weight)))


def kd_loss_with_grad(
    student_logits: Tensor,
    teacher_logits: Tensor | TopK,
    labels: Tensor | None = None,
    *,
    temperature: float = 4.0,
    alpha: float = 0.9,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    scale: float = 1.0,
    upstream: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`scale` times `upstream` times `kd_loss`, and the gradient of that with respect to the student's logits.

    `upstream` is a 0-dim tensor, for factors that change from step to step. The gradient is `[N, C]` in the
    student's dtype. Nothing is recorded for autograd and the host never waits.
    """
    teacher = _teacher(teacher_logits)
    given = _checked(Operands(student_logits, *teacher, labels, temperature, alpha, label_smoothing, weight))
    return _loss_with_grad(given, scale, upstream)


def _teacher(given: Tensor | TopK) -> tuple[Tensor, Tensor | None]:
    """Logits and None, or probabilities and indices."""
    if isinstance(given, Tensor):
        return given, None
    if not (isinstance(given, (tuple, list)) and len(given) == 2 and all(isinstance(part, Tensor) for part in given)):
        raise OperandError(
            f"teacher_logits is a {type(given).__name__}; "
            "give a tensor [N, C], or (indices, probabilities), both [N, k]."
        )
    indices, probabilities = given
    return probabilities, indices


def _checked(given: Operands) -> Operands:
    student, teacher, indices, weight = given.student, given.teacher, given.indices, given.weight
    check_student(student, given.temperature)
    if indices is None:
        check_teacher(teacher, student)
    else:
        fits = teacher.is_floating_point() and indices.dtype == torch.int64 and teacher.shape == indices.shape
        count, classes = student.shape
        if not (fits and teacher.dim() == 2 and teacher.shape[0] == count and 1 <= teacher.shape[1] <= classes):
            raise OperandError(
                f"the teacher's indices are {describe(indices)} and its probabilities {describe(teacher)}; "
                f"they must be int64 and floating point, both [{count}, k] with k in 1..{classes}."
            )
    if given.labels is not None:
        check_labels(given.labels, student)
    if weight is not None:
        if not (weight.is_floating_point() and weight.shape == student.shape[:1]):
            raise OperandError(f"weight is {describe(weight)}; it must be floating point [{student.shape[0]}].")
    if not 0 <= given.label_smoothing < 1:
        raise OperandError(f"label_smoothing={given.label_smoothing} was given; it must be in [0, 1).")
    return given


_loss, _loss_with_grad = define_loss(
    "kd_loss",
    Operands,
    reference.kd_loss,
    reference.kd_loss_with_grad,
    differentiable=("student", "teacher", "weight"),
)
serve_cpu(kd_loss=cpu_impl.kd_loss, kd_loss_with_grad=cpu_impl.kd_loss_with_grad)
serve_cuda(__name__, kd_loss=reference.kd_loss, kd_loss_with_grad=reference.kd_loss_with_grad)
