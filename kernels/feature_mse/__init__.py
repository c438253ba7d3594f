"""Mean squared error between student and teacher features, on a scale of choice."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from stablekd_fast.kernels._checks import OperandError
from stablekd_fast.kernels._features import check_features
from stablekd_fast.kernels._registry import define_loss, serve_cpu, serve_cuda
from stablekd_fast.kernels.feature_mse import cpu_impl, reference
from stablekd_fast.kernels.feature_mse.reference import Operands

Normalize = Literal["power", "channel", "l2"] | None


def feature_mse(
    student: Tensor,
    target: Tensor,
    *,
    normalize: Normalize = None,
    scale: Tensor | None = None,
    target_scale: Tensor | None = None,
    channel_axis: int = 1,
) -> Tensor:
    """Mean of (student - target)^2 over all elements of `[N, ...]`, or a normalised form of it.

    `normalize` chooses the form:

    - `None`: the plain mean.
    - `"power"`: the plain mean divided by mean(target^2) over the whole tensor, or by `scale` where it is given (both
      at least 1e-12).
    - `"channel"`: student and target are both standardised with the target's mean and standard deviation per
      channel (population variance plus 1e-5, over the batch and all positions).
    - `"l2"`: each sample is flattened and scaled to unit length (epsilon 1e-12 under the root); the squared
      distance is *summed* over a sample's elements and averaged over the N samples, so it lies between 0 and 4.

    Student and target are read where they lie if both have one memory format, contiguous or channels-last; otherwise
    the target is laid out anew.

    Args:
        student: `[N, ..., C, ...]`.
        target: of the student's shape; fp32, bf16, fp16 or fp64, or int8 or float8_e4m3fn codes.
        scale: a 0-dim tensor for `"power"`, which saves a pass over the target.
        target_scale: float32 `[C]` or `[N, C]`, with codes: value = code * scale of its channel, as `quantize_rows`
            makes them.
        channel_axis: where channels lie; 1 for `[N, C, H, W]`, -1 for tokens `[N, T, C]`.

    Returns a 0-dim tensor, float64 for a float64 student and float32 otherwise. It may be differentiated twice, with
    respect to student, target and scale. Raises OperandError for shapes or settings that do not fit.
    """
    return _loss(_checked(Operands(student, target, target_scale, normalize, scale, channel_axis)))


def feature_mse_with_grad(
    student: Tensor,
    target: Tensor,
    *,
    normalize: Normalize = None,
    scale: Tensor | None = None,
    target_scale: Tensor | None = None,
    channel_axis: int = 1,
    weight: float = 1.0,
    upstream: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`weight` times `upstream` times `feature_mse`, and the gradient of that with respect to the student.

    `upstream` is a 0-dim tensor, for factors that change from step to step. The gradient has the student's shape,
    dtype and memory format. Nothing is recorded for autograd and the host never waits.
    """
    given = _checked(Operands(student, target, target_scale, normalize, scale, channel_axis))
    return _loss_with_grad(given, weight, upstream)


def _checked(given: Operands) -> Operands:
    check_features(given)
    normalize, scale = given.normalize, given.power
    if normalize not in (None, "power", "channel", "l2"):
        raise OperandError(f"normalize={normalize!r} was given; it must be None, 'power', 'channel' or 'l2'.")
    if scale is not None and not (normalize == "power" and scale.dim() == 0):
        raise OperandError(
            f"scale was given with normalize={normalize!r}; it needs normalize='power' and must be a 0-dim tensor."
        )
    return given


_loss, _loss_with_grad = define_loss(
    "feature_mse",
    Operands,
    reference.feature_mse,
    reference.feature_mse_with_grad,
    differentiable=("student", "target", "power"),
)
serve_cpu(feature_mse=cpu_impl.feature_mse, feature_mse_with_grad=cpu_impl.feature_mse_with_grad)
serve_cuda(__name__, feature_mse=reference.feature_mse, feature_mse_with_grad=reference.feature_mse_with_grad)
