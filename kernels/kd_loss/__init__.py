"""Knowledge distillation of logits with optional labels (Hinton, Vinyals, Dean: arXiv 1503.02531)."""

from __future__ import annotations

import torch
from torch import Tensor

from stablekd_fast.kernels._checks import accumulator, describe, require
from stablekd_fast.kernels._registry import define
from stablekd_fast.kernels.kd_loss import reference

_ARGUMENTS = (
    "Tensor student_logits, Tensor teacher_logits, Tensor? labels, "
    "float temperature, float alpha, float label_smoothing, Tensor? weight"
)


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 4.0,
    alpha: float = 0.9,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
) -> Tensor:
    """alpha * T^2 * KL(teacher || student) + (1 - alpha) * cross entropy, averaged over the batch.

    `student_logits` and `teacher_logits` are `[N, C]`, `labels` int64 `[N]` with values in 0..C-1. Both
    distributions of the KL term are taken at temperature T, the cross entropy at 1. Without labels the KL term
    stands alone, with alpha = 1. `weight` `[N]` multiplies each sample's term; the mean stays over N.
    A class whose logit is -inf in both takes no part, in label smoothing neither.

    Returns a 0-dim tensor, float64 for float64 logits and float32 otherwise. It may be differentiated twice, with
    respect to the logits of both and the weight. Raises OperandError for shapes or settings that do not fit.
    """
    _check(student_logits, teacher_logits, labels, temperature, label_smoothing, weight)
    return torch.ops.stablekd.kd_loss(
        student_logits, teacher_logits, labels, temperature, alpha, label_smoothing, weight
    )


def kd_loss_with_grad(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 4.0,
    alpha: float = 0.9,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`scale` times `kd_loss`, and the gradient of that product with respect to the student's logits.

    The gradient is `[N, C]` in the student's dtype. Nothing is recorded for autograd and the host never waits.
    """
    _check(student_logits, teacher_logits, labels, temperature, label_smoothing, weight)
    return torch.ops.stablekd.kd_loss_with_grad(
        student_logits.detach(),
        teacher_logits.detach(),
        labels,
        temperature,
        alpha,
        label_smoothing,
        None if weight is None else weight.detach(),
        scale,
    )


def _check(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    temperature: float,
    label_smoothing: float,
    weight: Tensor | None,
) -> None:
    require(
        student.dim() == 2 and student.is_floating_point(),
        f"student_logits is {describe(student)}; it must be a floating point [N, C].",
    )
    require(
        teacher.shape == student.shape and teacher.is_floating_point(),
        f"teacher_logits is {describe(teacher)} but student_logits {describe(student)}; "
        "teacher and student must have the same batch and classes.",
    )
    for name, tensor, dtypes in (("labels", labels, (torch.int64,)), ("weight", weight, None)):
        if tensor is None:
            continue
        fits = tensor.dtype in dtypes if dtypes else tensor.is_floating_point()
        require(
            tensor.shape == student.shape[:1] and fits,
            f"{name} is {describe(tensor)}; it must be {'int64' if dtypes else 'floating point'} [{student.shape[0]}].",
        )
    require(temperature > 0, f"temperature={temperature} was given; it must be greater than 0.")
    require(0 <= label_smoothing < 1, f"label_smoothing={label_smoothing} was given; it must be in [0, 1).")


def _loss_fake(student, *_):
    return student.new_empty((), dtype=accumulator(student.dtype))


def _with_grad_fake(student, *_):
    return student.new_empty((), dtype=accumulator(student.dtype)), torch.empty_like(student)


def _setup_context(ctx, inputs, output) -> None:
    student, teacher, labels, *ctx.settings, weight = inputs
    ctx.save_for_backward(student, teacher, labels, weight)


def _backward(ctx, upstream: Tensor):
    student, teacher, labels, weight = ctx.saved_tensors
    if torch.is_grad_enabled() or ctx.needs_input_grad[1] or ctx.needs_input_grad[6]:
        student_grad, teacher_grad, weight_grad = _through_reference(ctx, upstream)
    else:
        _, student_grad = torch.ops.stablekd.kd_loss_with_grad(student, teacher, labels, *ctx.settings, weight, 1.0)
        student_grad, teacher_grad, weight_grad = student_grad * upstream, None, None
    return student_grad, teacher_grad, None, None, None, None, weight_grad


def _through_reference(ctx, upstream: Tensor) -> list[Tensor | None]:
    """Gradients that can themselves be differentiated, for student, teacher and weight."""
    student, teacher, labels, weight = ctx.saved_tensors
    create_graph = torch.is_grad_enabled()
    operands = [student, teacher, weight]
    wanted = [operand for operand in operands if operand is not None and operand.requires_grad]
    with torch.enable_grad():
        loss = reference.kd_loss(student, teacher, labels, *ctx.settings, weight)
        gradients = iter(torch.autograd.grad(loss, wanted, upstream, create_graph=create_graph))
    return [next(gradients) if operand is not None and operand.requires_grad else None for operand in operands]


define("kd_loss", f"({_ARGUMENTS}) -> Tensor", reference.kd_loss, _loss_fake)
define(
    "kd_loss_with_grad",
    f"({_ARGUMENTS}, float scale) -> (Tensor, Tensor)",
    reference.kd_loss_with_grad,
    _with_grad_fake,
)
torch.library.register_autograd("stablekd::kd_loss", _backward, setup_context=_setup_context)
