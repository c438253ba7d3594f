"""`batch_norm_act` and its gradient, readably. Float64 stays float64, everything else is computed in float32.

Batch normalisation: Ioffe and Szegedy, arXiv 1502.03167, algorithm 1 and section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stablekd_fast.kernels._checks import accumulator


def batch_norm_act(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    batches: Tensor | None,
    momentum: float,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y = max(0, (x - mean) / sqrt(variance + eps) * weight + bias + residual), mean, biased variance.

    Running statistics and the count of batches are brought up to date in place.
    """
    values = x.to(accumulator(x.dtype))
    axes = [axis for axis in range(x.dim()) if axis != 1]
    variance, mean = torch.var_mean(values, axes, correction=0)
    y = (values - _across(mean, x)) * _across(weight * torch.rsqrt(variance + eps), x) + _across(bias, x)
    if residual is not None:
        y = y + residual
    if relu:
        y = y.relu()
    keep_running(running_mean, running_var, batches, mean, variance, momentum, x.numel() // x.shape[1])
    return torch.empty_like(x).copy_(y), mean, variance


def keep_running(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    batches: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    momentum: float,
    count: int,
) -> None:
    """Bring running statistics up to date in place, as torch does: the variance, of `count` values, unbiased."""
    if running_mean is not None:
        assert running_var is not None
        running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
        running_var.mul_(1 - momentum).add_(variance, alpha=momentum * count / (count - 1))
    if batches is not None:
        batches.add_(1)


def batch_norm_act_backward(
    gradient: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    eps: float,
    relu: bool,
    with_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients with respect to x, weight, bias and residual (empty unless it is asked for).

    Without a residual `y` may be None: x says where the ReLU let through.
    """
    axes = [axis for axis in range(x.dim()) if axis != 1]
    inverse_std = torch.rsqrt(variance + eps)
    centred = (x - _across(mean, x)) * _across(inverse_std, x)
    passed = gradient
    if relu:
        made = centred * _across(weight, x) + _across(bias, x) if y is None else y
        passed = torch.where(made > 0, gradient, 0)
    incoming = passed.to(accumulator(x.dtype))
    bias_gradient, weight_gradient = incoming.sum(axes), (incoming * centred).sum(axes)
    count = x.numel() // x.shape[1]
    centred_gradient = incoming - _across(bias_gradient / count, x) - centred * _across(weight_gradient / count, x)
    x_gradient = torch.empty_like(x).copy_(centred_gradient * _across(weight * inverse_std, x))
    residual_gradient = torch.empty_like(x).copy_(passed) if with_residual else x.new_empty(0)
    return x_gradient, weight_gradient.to(weight.dtype), bias_gradient.to(weight.dtype), residual_gradient


def _across(channels: Tensor, x: Tensor) -> Tensor:
    """`[C]` as `[1, C, 1, ...]`."""
    return channels.view(1, -1, *[1] * (x.dim() - 2))
