"""Attention transfer (Zagoruyko and Komodakis: arXiv 1612.03928)."""

from __future__ import annotations

from torch import Tensor

from stablekd_fast.kernels._checks import OperandError, describe
from stablekd_fast.kernels._registry import define_loss, serve_cpu, serve_cuda
from stablekd_fast.kernels.attention_transfer import cpu_impl, reference
from stablekd_fast.kernels.attention_transfer.reference import Operands


def attention_transfer(student: Tensor, target: Tensor, *, power: float = 2.0) -> Tensor:
    """Mean squared difference of the spatial attention maps of `[N, C, H, W]` and `[N, D, H, W]`.

    A map is the mean of |x|^power over the channels at each position, flattened to `[N, H * W]` and scaled to unit
    length per sample (epsilon 1e-12 under the root). The channel counts may differ. The mean is taken over all N * H *
    W elements, as the authors' code does.

    Returns a 0-dim tensor, float64 for a float64 student and float32 otherwise, differentiable to any order where
    |x|^power is. Raises OperandError for shapes or settings that do not fit.
    """
    return _loss(_checked(Operands(student, target, float(power))))


def attention_transfer_with_grad(
    student: Tensor, target: Tensor, *, power: float = 2.0, weight: float = 1.0, upstream: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`weight` times `upstream` times `attention_transfer`, and the gradient of that with respect to the student.

    `upstream` is a 0-dim tensor. The gradient has the student's shape, dtype and memory format. Nothing is recorded
    for autograd and the host never waits.
    """
    return _loss_with_grad(_checked(Operands(student, target, float(power))), weight, upstream)


def _checked(given: Operands) -> Operands:
    student, target, power = given
    for name, features in (("student", student), ("target", target)):
        if not (features.dim() == 4 and features.is_floating_point()):
            raise OperandError(f"{name} is {describe(features)}; it must be a floating point [N, C, H, W].")
    if not (student.shape[0] == target.shape[0] and student.shape[2:] == target.shape[2:]):
        raise OperandError(
            f"target is {describe(target)} but student {describe(student)}; batch, height and width must agree, "
            "so resize one of them before comparing."
        )
    if not power >= 1:
        raise OperandError(f"power={power} was given; it must be at least 1.")
    return given


_loss, _loss_with_grad = define_loss(
    "attention_transfer",
    Operands,
    reference.attention_transfer,
    reference.attention_transfer_with_grad,
    differentiable=("student", "target"),
)
serve_cpu(
    attention_transfer=cpu_impl.attention_transfer,
    attention_transfer_with_grad=cpu_impl.attention_transfer_with_grad,
)
serve_cuda(
    __name__,
    attention_transfer=reference.attention_transfer,
    attention_transfer_with_grad=reference.attention_transfer_with_grad,
)
