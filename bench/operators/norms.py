"""Cases of `batch_norm_act`: forward and backward of batch norm, residual and ReLU."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from stablekd_fast import kernels
from stablekd_fast.bench.core import Case, Contender
from stablekd_fast.bench.floor import FLOOR, floor_contenders
from stablekd_fast.bench.operators.features import BFLOAT, CHANNELS_LAST, FLOAT, Map
from stablekd_fast.bench.operators.losses import Setting

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""The largest error of output and gradients, each over its largest magnitude, by dtype."""
_MAPS = [
    Map(shape, dtype, CHANNELS_LAST) for shape in ((128, 16, 32, 32), (32, 64, 56, 56)) for dtype in (FLOAT, BFLOAT)
]
_QUICK = [Map((16, 32, 8, 8), FLOAT, CHANNELS_LAST)]
_FAR = 12.0
"""The bias, so large that hardly an element lies at the ReLU's kink, where a rounding decides about its gradient."""

Operands = tuple[Tensor, Tensor, Tensor, Tensor]


def batch_norm_act_cases(setting: Setting) -> Iterator[Case]:
    for features in _QUICK if setting.quick else _MAPS:
        yield _case(features, setting)


def _case(features: Map, setting: Setting) -> Case:
    x, residual = (features.draw(seed, setting.device) for seed in range(2))
    gradient = (
        torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(x).contiguous(memory_format=features.layout)
    )
    channels = features.shape[1]
    weight, bias = torch.ones(channels, device=setting.device), torch.full((channels,), _FAR, device=setting.device)
    operands = (x, residual, weight, bias)
    contenders = [Contender("eager", _both(_plain, operands, gradient))]
    if setting.compile:
        contenders.append(Contender("compiled", _both(torch.compile(_plain, dynamic=False), operands, gradient)))
    contenders.append(Contender("stablekd", _both(_fused, operands, gradient), role="ours"))
    # Read: x and the residual forward; the gradient, x and y backward. Written: y, and the gradients of x and residual.
    read, written = 5 * x.nbytes, 3 * x.nbytes
    contenders += floor_contenders(read, written, setting.device)
    exact = _both(_plain, tuple(tensor.double() for tensor in operands), gradient.double())
    name = f"batch_norm_act {features}"
    return Case(
        "kernels", name, contenders, "eager", exact, TOLERANCE[features.dtype], {"bytes": read + written}, FLOOR
    )


def _plain(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.relu(F.batch_norm(x, None, None, weight, bias, training=True) + residual)


def _fused(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return kernels.batch_norm_act(x, weight, bias, residual=residual)


def _both(function: Callable[..., Tensor], operands: Operands, gradient: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    leaves = [tensor.detach().requires_grad_() for tensor in operands]

    def call() -> tuple[Tensor, ...]:
        y = function(*leaves)
        return y.detach(), *torch.autograd.grad(y, leaves, gradient)

    return call
