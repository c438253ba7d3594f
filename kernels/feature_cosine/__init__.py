"""Angle between student and teacher features: 1 - cosine."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from stablekd_fast.kernels._checks import OperandError
from stablekd_fast.kernels._features import check_features
from stablekd_fast.kernels._registry import define_loss, serve_cpu, serve_cuda
from stablekd_fast.kernels.feature_cosine import cpu_impl, reference
from stablekd_fast.kernels.feature_cosine.reference import Operands

Per = Literal["position", "sample"]


def feature_cosine(
    student: Tensor,
    target: Tensor,
    *,
    per: Per = "position",
    target_scale: Tensor | None = None,
    channel_axis: int = 1,
) -> Tensor:
    """Mean of 1 - cosine(student, target) over the positions or samples of `[N, ..., C, ...]`; between 0 and 2.

    - `per="position"`: vectors are the C channels of one position of one sample. Channels lie on `channel_axis`:
      1 for `[N, C, H, W]`, -1 for tokens `[N, T, C]`.
    - `per="sample"`: vectors are whole flattened samples.

    Lengths have 1e-12 under the root, so an all-zero vector has the loss 1 and a finite gradient. `target` and
    `target_scale` are as in `feature_mse`, memory formats too.

    Returns a 0-dim tensor, float64 for a float64 student and float32 otherwise. It may be differentiated twice, with
    respect to student and target. Raises OperandError for shapes or settings that do not fit.
    """
    return _loss(_checked(Operands(student, target, target_scale, per, channel_axis)))


def feature_cosine_with_grad(
    student: Tensor,
    target: Tensor,
    *,
    per: Per = "position",
    target_scale: Tensor | None = None,
    channel_axis: int = 1,
    weight: float = 1.0,
    upstream: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`weight` times `upstream` times `feature_cosine`, and the gradient of that with respect to the student.

    `upstream` is a 0-dim tensor, for factors that change from step to step. The gradient has the student's shape,
    dtype and memory format. Nothing is recorded for autograd and the host never waits.
    """
    given = _checked(Operands(student, target, target_scale, per, channel_axis))
    return _loss_with_grad(given, weight, upstream)


def _checked(given: Operands) -> Operands:
    check_features(given)
    if given.per not in ("position", "sample"):
        raise OperandError(f"per={given.per!r} was given; it must be 'position' or 'sample'.")
    return given


_loss, _loss_with_grad = define_loss(
    "feature_cosine",
    Operands,
    reference.feature_cosine,
    reference.feature_cosine_with_grad,
    differentiable=("student", "target"),
)
serve_cpu(feature_cosine=cpu_impl.feature_cosine, feature_cosine_with_grad=cpu_impl.feature_cosine_with_grad)
serve_cuda(
    __name__, feature_cosine=reference.feature_cosine, feature_cosine_with_grad=reference.feature_cosine_with_grad
)
