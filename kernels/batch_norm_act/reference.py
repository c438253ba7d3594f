"""`batch_norm_act` and its gradient, readably. Float64 stays float64, everything else is computed in float32.

Batch normalisation: Ioffe and Szegedy, arXiv 1502.03167, algorithm 1 and section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stablekd_fast.kernels._checks import accumulator


def batch_norm_act(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y = max(0, (x - mean) / sqrt(variance + eps) * weight + bias + residual), mean, biased variance."""
    values = x.to(accumulator(x.dtype))
    axes = [axis for axis in range(x.dim()) if axis != 1]
    variance, mean = torch.var_mean(values, axes, correction=0)
    y = (values - _across(mean, x)) * _across(weight * torch.rsqrt(variance + eps), x) + _across(bias, x)
    if residual is not None:
        y = y + residual
    if relu:
        y = y.relu()
    return torch.empty_like(x).copy_(y), mean, variance


def batch_norm_act_backward(
    gradient: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    mean: Tensor,
    variance: Tensor,
    eps: float,
    with_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients with respect to x, weight, bias and residual (empty unless it is asked for).

    `y` is None without ReLU.
    """
    axes = [axis for axis in range(x.dim()) if axis != 1]
    passed = gradient if y is None else torch.where(y > 0, gradient, 0)
    incoming = passed.to(accumulator(x.dtype))
    inverse_std = torch.rsqrt(variance + eps)
    centred = (x - _across(mean, x)) * _across(inverse_std, x)
    bias_gradient, weight_gradient = incoming.sum(axes), (incoming * centred).sum(axes)
    count = x.numel() // x.shape[1]
    centred_gradient = incoming - _across(bias_gradient / count, x) - centred * _across(weight_gradient / count, x)
    x_gradient = torch.empty_like(x).copy_(centred_gradient * _across(weight * inverse_std, x))
    residual_gradient = torch.empty_like(x).copy_(passed) if with_residual else x.new_empty(0)
    return x_gradient, weight_gradient.to(weight.dtype), bias_gradient.to(weight.dtype), residual_gradient


def _across(channels: Tensor, x: Tensor) -> Tensor:
    """`[C]` as `[1, C, 1, ...]`."""
    return channels.view(1, -1, *[1] * (x.dim() - 2))
