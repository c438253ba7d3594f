"""The floor under a kernel's time: how fast this machine's memory takes as many reads and writes, measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from stablekd_fast.bench.core import Contender
from stablekd_fast.kernels._native import core

Add = Callable[[Tensor, Tensor, Tensor], None]

FLOOR = "floor"

_FLOAT_BYTES = 4
_VECTOR = 16
"""Floats in the widest vector: stores past the caches must begin at one."""


class Traffic(NamedTuple):
    """Elements that are added (two reads, one write), copied, filled (a write alone) and summed (a read alone)."""

    added: int
    copied: int
    filled: int
    summed: int


def floor_contenders(read: int, written: int, device: str, operands: Sequence[Tensor] = ()) -> list[Contender]:
    """Return variants of the contender `floor`: each reads `read` and writes `written` bytes of arrays made beforehand.

    Additions and copies are made by torch, and on the CPU also by the C++ core, through the caches and past them.
    Fills and sums, which only unbalanced traffic has, are torch's. Where the `operands` of the kernel above are two
    dense float32 tensors of the right size they are what is added: the same memory at the same place, since speeds
    differ by a tenth from one allocation to another.
    """
    traffic = split(-(-read // _FLOAT_BYTES), -(-written // _FLOAT_BYTES))
    own = [tensor for tensor in operands if tensor.dtype == torch.float32 and tensor.numel() == traffic.added]
    if len(own) == 2:
        left, right = (tensor.as_strided((traffic.added,), (1,)) for tensor in own)
    else:
        left, right = torch.rand(2, traffic.added, device=device)
    original, alone = (torch.rand(count, device=device) for count in (traffic.copied, traffic.summed))
    adds: dict[str, Add] = {"torch": _torch_add}
    if device == "cpu" and core is not None:
        adds["core"] = partial(_core_add, nontemporal=False)
        adds["core, past the caches"] = partial(_core_add, nontemporal=True)
    out = torch.empty(traffic.added + traffic.copied + traffic.filled, device=device)
    return [_contender(variant, add, left, right, original, alone, out) for variant, add in adds.items()]


def split(reads: int, writes: int) -> Traffic:
    """Divide `reads` and `writes` of elements into as few kinds of traffic as it takes."""
    added = min(max(reads - writes, 0), writes) // _VECTOR * _VECTOR
    copied = min(writes - added, reads - 2 * added)
    return Traffic(added, copied, writes - added - copied, reads - 2 * added - copied)


def _contender(
    variant: str, add: Add, left: Tensor, right: Tensor, original: Tensor, alone: Tensor, out: Tensor
) -> Contender:
    total, copy, filled = out.tensor_split([len(left), len(left) + len(original)])

    def call() -> Tensor:
        if len(left):
            add(left, right, total)
        if len(original):
            add(original, original, copy)  # the second read of an element comes from a register or the nearest cache
        if len(filled):
            filled.fill_(1.0)
        if len(alone):
            alone.sum()
        return out

    def expected() -> Tensor:
        return torch.cat([left.double() + right, 2 * original.double(), torch.ones_like(filled, dtype=torch.float64)])

    return Contender(FLOOR, call, variant, expected=expected, tolerance=1e-6, role="limit")


def _torch_add(a: Tensor, b: Tensor, out: Tensor) -> None:
    torch.add(a, b, out=out)


def _core_add(a: Tensor, b: Tensor, out: Tensor, nontemporal: bool) -> None:
    core.stream(a.data_ptr(), b.data_ptr(), out.data_ptr(), out.numel(), nontemporal, torch.get_num_threads())
