"""Mean squared error between student and teacher features, on a scale of choice."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from stablekd_fast.kernels._checks import accumulator, describe, require
from stablekd_fast.kernels._registry import define
from stablekd_fast.kernels.feature_mse import reference

Normalize = Literal["power", "channel", "l2"] | None

_ARGUMENTS = "Tensor student, Tensor target, str? normalize, Tensor? scale, int channel_axis"


def feature_mse(
    student: Tensor,
    target: Tensor,
    *,
    normalize: Normalize = None,
    scale: Tensor | None = None,
    channel_axis: int = 1,
) -> Tensor:
    """Mean of (student - target)^2 over all elements of `[N, ...]`, or a normalised form of it.

    - `None`: the plain mean.
    - `"power"`: the plain mean divided by mean(target^2) over the whole tensor, or by the 0-dim tensor `scale`
      where one is given (both at least 1e-12).
    - `"channel"`: student and target are both standardised with the target's mean and standard deviation per
      channel (population variance plus 1e-5). Channels lie on `channel_axis`: 1 for `[N, C, H, W]`, -1 for tokens
      `[N, T, C]`.
    - `"l2"`: each sample is flattened and scaled to unit length (epsilon 1e-12 under the root); the squared
      distance is *summed* over a sample's elements and averaged over the N samples, so it lies between 0 and 4.

    Returns a 0-dim tensor, float64 for a float64 student and float32 otherwise. It may be differentiated twice, with
    respect to student, target and scale. Raises OperandError for shapes or settings that do not fit.
    """
    _check(student, target, normalize, scale, channel_axis)
    return torch.ops.stablekd.feature_mse(student, target, normalize, scale, channel_axis)


def feature_mse_with_grad(
    student: Tensor,
    target: Tensor,
    *,
    normalize: Normalize = None,
    scale: Tensor | None = None,
    channel_axis: int = 1,
    weight: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`weight` times `feature_mse`, and the gradient of that product with respect to the student.

    The gradient has the student's shape, dtype and memory format. Nothing is recorded for autograd and the host
    never waits.
    """
    _check(student, target, normalize, scale, channel_axis)
    return torch.ops.stablekd.feature_mse_with_grad(
        student.detach(),
        target.detach(),
        normalize,
        None if scale is None else scale.detach(),
        channel_axis,
        weight,
    )


def _check(student: Tensor, target: Tensor, normalize: Normalize, scale: Tensor | None, channel_axis: int) -> None:
    require(
        student.dim() >= 2 and student.is_floating_point(),
        f"student is {describe(student)}; it must be floating point with a batch axis and at least one more.",
    )
    require(
        target.shape == student.shape and target.is_floating_point(),
        f"target is {describe(target)} but student {describe(student)}; they must have one shape, "
        "so bridge the widths or resize before comparing.",
    )
    require(
        normalize in (None, "power", "channel", "l2"),
        f"normalize={normalize!r} was given; it must be None, 'power', 'channel' or 'l2'.",
    )
    require(
        scale is None or (normalize == "power" and scale.dim() == 0),
        f"scale was given with normalize={normalize!r}; it needs normalize='power' and must be a 0-dim tensor.",
    )
    require(
        -student.dim() <= channel_axis < student.dim() and channel_axis % student.dim() != 0,
        f"channel_axis={channel_axis} was given for {describe(student)}; it must name an axis other than the batch.",
    )


def _loss_fake(student, *_):
    return student.new_empty((), dtype=accumulator(student.dtype))


def _with_grad_fake(student, *_):
    return student.new_empty((), dtype=accumulator(student.dtype)), torch.empty_like(student)


def _setup_context(ctx, inputs, output) -> None:
    student, target, ctx.normalize, scale, ctx.channel_axis = inputs
    ctx.save_for_backward(student, target, scale)


def _backward(ctx, upstream: Tensor):
    student, target, scale = ctx.saved_tensors
    if torch.is_grad_enabled() or ctx.needs_input_grad[1] or ctx.needs_input_grad[3]:
        student_grad, target_grad, scale_grad = _through_reference(ctx, upstream)
    else:
        _, student_grad = torch.ops.stablekd.feature_mse_with_grad(
            student, target, ctx.normalize, scale, ctx.channel_axis, 1.0
        )
        student_grad, target_grad, scale_grad = student_grad * upstream, None, None
    return student_grad, target_grad, None, scale_grad, None


def _through_reference(ctx, upstream: Tensor) -> list[Tensor | None]:
    """Gradients that can themselves be differentiated, for student, target and scale."""
    create_graph = torch.is_grad_enabled()
    operands = list(ctx.saved_tensors)
    wanted = [operand for operand in operands if operand is not None and operand.requires_grad]
    with torch.enable_grad():
        student, target, scale = operands
        loss = reference.feature_mse(student, target, ctx.normalize, scale, ctx.channel_axis)
        gradients = iter(torch.autograd.grad(loss, wanted, upstream, create_graph=create_graph))
    return [next(gradients) if operand is not None and operand.requires_grad else None for operand in operands]


define("feature_mse", f"({_ARGUMENTS}) -> Tensor", reference.feature_mse, _loss_fake)
define(
    "feature_mse_with_grad",
    f"({_ARGUMENTS}, float weight) -> (Tensor, Tensor)",
    reference.feature_mse_with_grad,
    _with_grad_fake,
)
torch.library.register_autograd("stablekd::feature_mse", _backward, setup_context=_setup_context)
