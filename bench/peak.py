"""Measures the limit of arithmetic: how many floating-point operations per second this machine reaches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from stablekd_fast.bench.core import SEED, Contender

TOLERANCES = {"fp32": (torch.float32, 1e-5), "bf16": (torch.bfloat16, 1e-2), "fp16": (torch.float16, 2e-3)}
"""The dtype of each precision, and the largest error of a result: that of rounding, as sums are taken in float32."""


def peak(precision: str) -> str:
    """Return the name of the limit."""
    return f"peak, {precision}"


def peak_contenders(precision: str) -> list[Contender]:
    """Return variants of the limit: a product of large matrices, and a convolution as networks have them."""
    dtype, tolerance = TOLERANCES[precision]
    generator = torch.Generator().manual_seed(SEED)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    left, right = draw(1024, 1024), draw(1024, 1024)
    images, weights = draw(8, 128, 28, 28), draw(128, 128, 3, 3)
    images, weights = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (images, weights))
    calls = {
        "matrix product": (torch.matmul, (left, right)),
        "3x3 convolution": (lambda x, w: nn.functional.conv2d(x, w, padding=1), (images, weights)),
    }
    return [_contender(precision, name, call, operands, tolerance) for name, (call, operands) in calls.items()]


def _contender(
    precision: str, variant: str, function: Callable[..., Tensor], operands: tuple[Tensor, ...], tolerance: float
) -> Contender:
    def call() -> Tensor:
        return function(*operands)

    def expected() -> Tensor:
        return function(*(tensor.double() for tensor in operands))

    name, flops = peak(precision), count_flops(call)
    return Contender(name, call, variant, expected=expected, tolerance=tolerance, role="limit", flops=flops, limit=name)


def count_flops(call: Callable[[], object]) -> int:
    """Count the floating-point operations of a call's convolutions and matrix products, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()
