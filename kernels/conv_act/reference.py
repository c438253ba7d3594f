"""`conv_act`, readably: torch's convolution, addition and ReLU."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F


def conv_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """max(0, convolution of x with weight + bias + residual)."""
    y = F.conv2d(x, weight, bias, stride, padding, dilation)
    return (y if residual is None else y + residual).relu()
