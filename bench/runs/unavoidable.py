"""The limit of a training step on a CPU: its convolutions and products alone, and all else at the speed of memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from stablekd_fast.bench.core import Contender
from stablekd_fast.bench.floor import floor_contenders
from stablekd_fast.bench.peak import count_flops, peak
from stablekd_fast.execution.emulator import Operation

NAME = "convolutions alone, the rest as bytes"
ARITHMETIC = {"convolution", "convolution_backward", "mm", "addmm", "bmm"}
"""Operations whose time is arithmetic. Norms, activations, additions and losses could at best be as fast as memory."""
_LARGEST = 256 << 20
"""The bytes of memory that are moved at once; more are moved by doing so again."""


def unavoidable(calls: list[Operation], precision: str, tolerance: float) -> Iterator[Contender]:
    """Give variants of the limit of a step that consists of these operations, in `fp32` or `bf16`: each runs the
    arithmetic, and moves as many bytes as all other operations read and write, as fast as this machine's memory can."""
    arithmetic = [call for call in calls if call.function._opname in ARITHMETIC]
    read, written = moved([call for call in calls if call.function._opname not in ARITHMETIC])
    times = max(1, math.ceil((read + written) / _LARGEST))
    name = NAME if precision == "fp32" else f"{NAME}, {precision}"
    flops = count_flops(lambda: _run(arithmetic))
    for floor in floor_contenders(read // times, written // times, "cpu"):
        yield Contender(
            name, _both(arithmetic, floor.call, times), floor.variant, expected=lambda: _exact(arithmetic),
            tolerance=tolerance, role="limit", flops=flops, limit=peak(precision),
            extras={"bytes_moved": read + written},
        )  # fmt: skip


def moved(calls: list[Operation]) -> tuple[int, int]:
    """Return the bytes that operations read and write, each tensor once for each operation."""
    read = written = 0
    for call in calls:
        inputs = {id(tensor): tensor.nbytes for tensor in call.inputs}
        fresh = {id(tensor): tensor.nbytes for tensor in call.outputs if id(tensor) not in inputs}
        changed = sum(tensor.nbytes for tensor in call.outputs if id(tensor) in inputs)
        read, written = read + sum(inputs.values()), written + sum(fresh.values()) + changed
    return read, written


def _both(arithmetic: list[Operation], move: Callable[[], object], times: int) -> Callable[[], Tensor]:
    def call() -> Tensor:
        for _ in range(times):
            move()
        return _run(arithmetic)

    return call


@torch.no_grad()
def _run(calls: list[Operation]) -> Tensor:
    """Run operations; return what the last convolution or product of the forward passes gives."""
    last = None
    for call in calls:
        result = call.function(*call.args, **call.kwargs)
        last = result if isinstance(result, Tensor) else last
    assert last is not None, "a step has a convolution or a product"
    return last


def _exact(calls: list[Operation]) -> Tensor:
    """Return in float64 what `_run` returns."""
    last = [call for call in calls if isinstance(call.result, Tensor)][-1]
    args = [value.double() if isinstance(value, Tensor) else value for value in last.args]
    with torch.no_grad():
        return last.function(*args, **last.kwargs)
