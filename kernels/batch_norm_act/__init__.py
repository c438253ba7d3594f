"""Batch normalisation in training, with the residual and the ReLU behind it, in one operator."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stablekd_fast.kernels._checks import OperandError, accumulator, describe
from stablekd_fast.kernels._registry import define, serve_cpu, serve_cuda
from stablekd_fast.kernels.batch_norm_act import cpu_impl, reference


def batch_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    batches: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    relu: bool = True,
) -> Tensor:
    """`relu(batch_norm(x) + residual)` of `x` `[N, C, ...]` by its own statistics, in x's dtype and memory format.

    What `torch.nn.BatchNorm2d` in training mode, an addition and a ReLU give, but that nothing in between is rounded to
    x's dtype or goes through memory. Running statistics `[C]` are updated in place as torch does, the variance
    unbiased, and `batches`, an int64 `[]`, counts them. `weight` and `bias` are `[C]`; `residual` has x's shape and
    dtype. Differentiable once, with respect to x, weight, bias and residual. The C++ core and Triton take channels-last
    maps, elsewhere the reference computes.

    Raises OperandError for shapes or dtypes that do not fit.
    """
    if not (x.dim() >= 2 and x.is_floating_point()):
        raise OperandError(f"x is {describe(x)}; it must be floating point [N, C, ...].")
    if x.numel() <= x.shape[1]:
        raise OperandError(f"x is {describe(x)}; a variance needs more than one value per channel.")
    for name, vector in (
        ("weight", weight),
        ("bias", bias),
        ("running_mean", running_mean),
        ("running_var", running_var),
    ):
        if vector is not None and vector.shape != (x.shape[1],):
            raise OperandError(f"{name} is {describe(vector)}; it must be [{x.shape[1]}], one value per channel of x.")
    if residual is not None and not (residual.shape == x.shape and residual.dtype == x.dtype):
        raise OperandError(f"residual is {describe(residual)}; it must be like x, {describe(x)}.")
    running = (running_mean, running_var, batches)
    if (running_mean is None) != (running_var is None):
        raise OperandError("One of running_mean and running_var was given; give both or neither.")
    return _BatchNormAct.apply(x, weight, bias, residual, *running, momentum, eps, relu)[0]


class _BatchNormAct(torch.autograd.Function):
    """torch.library registers no gradients for operators that write to their operands, as this one does to running
    statistics."""

    @staticmethod
    def forward(x, weight, bias, residual, *rest):
        return torch.ops.stablekd.batch_norm_act(x, residual, weight, bias, *rest)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, weight, bias, residual, *_, ctx.eps, relu = inputs
        y, mean, variance = output
        ctx.with_residual, ctx.relu = residual is not None, relu
        # Without a residual Triton sees from x where the ReLU let through, and does not read y.
        reads = relu and (residual is not None or not x.is_cuda)
        ctx.mark_non_differentiable(mean, variance)
        ctx.set_materialize_grads(False)  # zeros would be made for the two
        ctx.save_for_backward(x, y if reads else None, weight, bias, mean, variance)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor | None):  # type: ignore[override]  # the decorator says less of its arguments
        gradient = gradients[0]
        if gradient is None:
            return (None,) * 10
        x, y, *vectors = ctx.saved_tensors
        keeps = ctx.with_residual and ctx.relu  # without ReLU the residual's gradient is the one that came
        x_gradient, weight_gradient, bias_gradient, kept = torch.ops.stablekd.batch_norm_act_backward(
            gradient, x, y, *vectors, ctx.eps, ctx.relu, keeps
        )
        residual_gradient = (kept if ctx.relu else gradient) if ctx.with_residual else None
        return x_gradient, weight_gradient, bias_gradient, residual_gradient, *(None,) * 6


def _fake(x, residual, weight, *_):
    statistics = [weight.new_empty(weight.shape, dtype=accumulator(x.dtype)) for _ in range(2)]
    return torch.empty_like(x), *statistics


def _backward_fake(gradient, x, y, weight, bias, mean, variance, eps, relu, with_residual):
    kept = torch.empty_like(x) if with_residual else x.new_empty(0)
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight), kept


define(
    "batch_norm_act",
    "(Tensor x, Tensor? residual, Tensor weight, Tensor bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "Tensor(c!)? batches, float momentum, float eps, bool relu) -> (Tensor, Tensor, Tensor)",
    reference.batch_norm_act,
    _fake,
)
define(
    "batch_norm_act_backward",
    "(Tensor gradient, Tensor x, Tensor? y, Tensor weight, Tensor bias, Tensor mean, Tensor variance, float eps, "
    "bool relu, bool with_residual) -> (Tensor, Tensor, Tensor, Tensor)",
    reference.batch_norm_act_backward,
    _backward_fake,
)
serve_cpu(
    batch_norm_act=cpu_impl.batch_norm_act,
    batch_norm_act_backward=cpu_impl.batch_norm_act_backward,
)
serve_cuda(
    __name__,
    batch_norm_act=reference.batch_norm_act,
    batch_norm_act_backward=reference.batch_norm_act_backward,
)
