"""A convolution with its bias, the residual and the ReLU behind it, in one operator, for inference."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from stablekd_fast.errors import first_line
from stablekd_fast.kernels._checks import OperandError, describe
from stablekd_fast.kernels._registry import define, serve_library
from stablekd_fast.kernels.conv_act import reference


def conv_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
) -> Tensor:
    """`relu(conv2d(x) + residual)` of `x` `[N, C, H, W]`, in x's dtype and memory format; it has no gradient.

    `weight` is `[O, C, h, w]`, `bias` `[O]`, `residual` has the result's shape; all of x's dtype. On NVIDIA GPUs cuDNN
    adds and cuts off before it rounds and writes, in one kernel.

    Raises OperandError for dtypes that differ, and for a residual of another shape.
    """
    for name, other in (("weight", weight), ("bias", bias), ("residual", residual)):
        if other is not None and other.dtype != x.dtype:
            raise OperandError(f"{name} is {describe(other)}; it must have the dtype of x, which is {describe(x)}.")
    if residual is not None:
        shape = [len(x), len(weight), *_sides(x.shape[2:], weight.shape[2:], stride, padding, dilation)]
        if list(residual.shape) != shape:
            raise OperandError(f"residual is {describe(residual)}; it must have the result's shape, {shape}.")
    return torch.ops.stablekd.conv_act(x, weight, bias, residual, list(stride), list(padding), list(dilation))


def _sides(sides, window, stride, padding, dilation) -> list[int]:
    """Return height and width of a convolution's result."""
    each = zip(sides, window, stride, padding, dilation)
    return [(side + 2 * pad - apart * (own - 1) - 1) // step + 1 for side, own, step, pad, apart in each]


def _fake(x, weight, bias, residual, stride, padding, dilation):
    return F.conv2d(x, weight, bias, stride, padding, dilation)


_refused: set[str] = set()
"""What cuDNN said where it had no joined form; the reference has served since."""


def _by_cudnn(x, weight, bias, residual, stride, padding, dilation):
    sizes = (stride, padding, dilation, 1)
    if not _refused:
        try:
            if residual is None:
                return torch.cudnn_convolution_relu(x, weight, bias, *sizes)
            return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *sizes)
        except RuntimeError as error:
            if "cudnn" not in str(error).lower():
                raise
            _refused.add(first_line(error))
            warnings.warn(f"conv_act: {first_line(error)}. The reference is used.", RuntimeWarning, stacklevel=2)
    return reference.conv_act(x, weight, bias, residual, *sizes[:3])


define(
    "conv_act",
    "(Tensor x, Tensor weight, Tensor bias, Tensor? residual, int[] stride, int[] padding, int[] dilation) -> Tensor",
    reference.conv_act,
    _fake,
)
serve_library("conv_act", "cuDNN", _by_cudnn, lambda: next(iter(_refused), None))
