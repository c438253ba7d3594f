"""Batch norms whose statistics are those of the whole batch, not of one rank's part.

torch's SyncBatchNorm refuses tensors on a CPU; this one serves both devices, by two small exchanges per norm and step:
an all-gather of means and variances forward, an all-reduce of two sums of gradients backward.
"""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn

from stablekd_fast.distributed.layout import Averaging
from stablekd_fast.errors import ConfigError


class SyncNorm(nn.Module):
    """A batch norm of the network over the whole batch, of which each rank of a data axis holds an equal part
    `[N, C, ...]`.

    Parameters and buffers are the norm's own. In evaluation, and where it is frozen, it computes as the norm does.
    """

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm, averaging: Averaging) -> None:
        super().__init__()
        self.norm, self.averaging = norm, averaging

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        if not norm.training or norm.momentum is None:
            return norm(x)
        y, mean, variance = _Normalise.apply(x, norm.weight, norm.bias, norm.eps, self.averaging)
        if norm.track_running_stats:
            assert norm.num_batches_tracked is not None
            assert norm.running_mean is not None and norm.running_var is not None
            with torch.no_grad():
                count = self.averaging.count * x.numel() // x.shape[1]
                norm.num_batches_tracked.add_(1)
                norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
                norm.running_var.lerp_(
                    (variance * (count / max(count - 1, 1))).to(norm.running_var.dtype), norm.momentum
                )
        return y


class _Normalise(torch.autograd.Function):
    """Normalised values, and mean and biased variance `[C]` over all ranks, as in Ioffe and Szegedy (2015)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, averaging: Averaging):
        over = [axis for axis in range(x.dim()) if axis != 1]
        shape = [-1 if axis == 1 else 1 for axis in range(x.dim())]
        values = x if x.dtype == torch.float64 else x.float()
        own_variance, own_mean = torch.var_mean(values, over, correction=0)
        gathered = [torch.empty_like(torch.stack([own_mean, own_variance])) for _ in range(averaging.count)]
        with averaging.ranks.meeting("statistics of batch norms are gathered", averaging.group):
            dist.all_gather(gathered, torch.stack([own_mean, own_variance]), group=averaging.group)
        means, variances = torch.stack(gathered).unbind(1)
        mean = means.mean(0)  # parts are of one size; a variance from means and squares would cancel
        variance = variances.mean(0) + (means - mean).square().mean(0)
        scale = torch.rsqrt(variance + eps)
        centred = (values - mean.view(shape)) * scale.view(shape)
        y = centred
        if weight is not None:
            assert bias is not None
            y = centred * weight.view(shape) + bias.view(shape)
        ctx.save_for_backward(centred, weight, scale)
        ctx.averaging, ctx.over, ctx.shape = averaging, over, shape
        ctx.mark_non_differentiable(mean, variance)
        return y.to(x.dtype), mean, variance

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        gradient = gradients[0]  # mean and variance have none
        centred, weight, scale = ctx.saved_tensors
        over, shape = ctx.over, ctx.shape
        values = gradient.to(centred.dtype)
        for_bias, for_weight = values.sum(over), (values * centred).sum(over)
        count = values.numel() // values.shape[1]
        sums = torch.stack([for_bias, for_weight]) / count
        ctx.averaging.average([sums])
        inner = values - sums[0].view(shape) - centred * sums[1].view(shape)
        factor = scale if weight is None else scale * weight
        into = inner * factor.view(shape)
        if weight is None:
            return into.to(gradient.dtype), None, None, None, None
        return into.to(gradient.dtype), for_weight, for_bias, None, None


def sync_norms(block: nn.Module, averaging: Averaging) -> nn.Module:
    """The same traced block with `SyncNorm` in place of batch norms; parameters and buffers stay the network's own.

    Raises ConfigError for a block with batch norms that was not traced, or not down to its batch norms.
    """
    kind = nn.modules.batchnorm._BatchNorm
    norms = {name: module for name, module in block.named_modules() if isinstance(module, kind)}
    if not norms:
        return block
    if not isinstance(block, fx.GraphModule):
        raise ConfigError(
            "sync_norms=true was given, but the blocks were made by hand and hold batch norms; make them without."
        )
    synced = fx.GraphModule(block, copy.deepcopy(block.graph))
    for node in synced.graph.nodes:
        if node.op == "call_module" and node.target in norms:
            name = f"synced_{node.name}"
            synced.add_submodule(name, SyncNorm(norms[node.target], averaging))
            node.target = name
    left = [name for name, module in synced.named_modules() if isinstance(module, SyncNorm)]
    if len(left) < len(norms):
        raise ConfigError(
            "sync_norms=true was given, but batch norms lie inside modules that were not traced; train without it."
        )
    synced.delete_all_unused_submodules()
    synced.recompile()
    return synced
