"""Helpers of the calls into the C++ core: addresses, type numbers, how many threads are worth waking."""

from __future__ import annotations

import torch
from torch import Tensor

TYPES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.int8: 3,
    torch.float8_e4m3fn: 4,
}
"""The numbers of `Type` in csrc/kernels.h."""

GRAIN = 32768
"""Elements per thread below which waking a thread costs more than it saves."""

EXPONENTIAL_GRAIN = 4096
"""The elements per thread that are worth waking one where each element costs exponentials."""


def address(tensor: Tensor | None) -> int:
    """Return where the tensor's memory begins; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def threads(elements: int, grain: int) -> int:
    """Return as many threads as torch uses, but none for fewer than `grain` elements: waking one costs microseconds."""
    return max(1, min(torch.get_num_threads(), elements // grain))


def number(value: Tensor | None) -> float:
    """Return a 0-dim CPU tensor's value; 1 for none."""
    return 1.0 if value is None else float(value)
