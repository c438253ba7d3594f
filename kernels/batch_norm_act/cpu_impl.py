"""`batch_norm_act` by the C++ core: channels-last maps; others go to the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from stablekd_fast.kernels._checks import FLOATS
from stablekd_fast.kernels._cpu import GRAIN, TYPES, address, threads
from stablekd_fast.kernels._layout import laid_out_as
from stablekd_fast.kernels._native import core
from stablekd_fast.kernels.batch_norm_act import reference


def takes(x: Tensor, weight: Tensor) -> bool:
    """Say whether the core computes this map."""
    channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return channels_last and x.dtype in FLOATS and weight.dtype == torch.float32 and x.numel() > 0


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
    running = (running_mean, running_var, batches)
    if not takes(x, weight):
        return reference.batch_norm_act(x, residual, weight, bias, *running, momentum, eps, relu)
    y, mean, variance = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
    added = None if residual is None else laid_out_as(residual, x)
    core.batch_norm(
        address(x), address(added), address(y), TYPES[x.dtype], *_vectors(weight, bias, mean, variance), *_sizes(x),
        eps, relu, threads(x.numel(), GRAIN),
    )  # fmt: skip
    reference.keep_running(*running, mean, variance, momentum, x.numel() // x.shape[1])
    return y, mean, variance


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
    if not takes(x, weight) or (relu and y is None):
        given = (gradient, x, y, weight, bias, mean, variance)
        return reference.batch_norm_act_backward(*given, eps, relu, with_residual)
    incoming, x_gradient = laid_out_as(gradient, x), torch.empty_like(x)
    residual_gradient = torch.empty_like(x) if with_residual else x.new_empty(0)
    weight_gradient, bias_gradient = torch.empty_like(weight), torch.empty_like(weight)
    core.batch_norm_gradient(
        address(incoming), address(x), address(y), TYPES[x.dtype], *_vectors(weight, mean, variance),
        address(x_gradient), address(residual_gradient) if with_residual else 0,
        *_vectors(weight_gradient, bias_gradient), *_sizes(x), eps, threads(x.numel(), GRAIN),
    )  # fmt: skip
    return x_gradient, weight_gradient, bias_gradient, residual_gradient


def _vectors(*channels: Tensor) -> list[int]:
    return [address(values) for values in channels]


def _sizes(x: Tensor) -> tuple[int, int]:
    """Return the numbers of rows and of channels."""
    return x.numel() // x.shape[1], x.shape[1]
