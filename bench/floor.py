"""The floor under a kernel's time: how fast this machine's memory takes as many reads and writes, measured."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from stablekd_fast.bench.core import Contender
from stablekd_fast.kernels._native import core

Add = Callable[[Tensor, Tensor, Tensor], None]

_FLOAT_BYTES = 4
_VECTOR = 16
"""Floats in the widest vector: stores past the caches must begin at one."""


class Traffic(NamedTuple):
    """Elements that are added (two reads, one write), copied, filled (a write alone) and summed (a read alone)."""

    added: int
    copied: int
    filled: int
    summed: int


def floor_contenders(read: int, written: int, device: str) -> list[Contender]:
    """Variants of the contender `floor`: each reads `read` and writes `written` bytes of arrays made beforehand.

    Additions and copies are made by torch, and on the CPU also by the C++ core, through the caches and past them.
    Fills and sums, which only unbalanced traffic has, are torch's.
    """
    traffic = split(-(-read // _FLOAT_BYTES), -(-written // _FLOAT_BYTES))
    first = torch.rand(traffic.added + traffic.copied + traffic.summed, device=device)
    second = torch.rand(traffic.added, device=device)
    out = torch.empty(traffic.added + traffic.copied + traffic.filled, device=device)
    adds: dict[str, Add] = {"torch": _torch_add}
    if device == "cpu" and core is not None:
        adds["core"] = partial(_core_add, nontemporal=False)
        adds["core, past the caches"] = partial(_core_add, nontemporal=True)
    return [_contender(variant, add, traffic, first, second, out) for variant, add in adds.items()]


def split(reads: int, writes: int) -> Traffic:
    """The traffic of `reads` and `writes` elements in as few kinds as it takes."""
    added = min(max(reads - writes, 0), writes) // _VECTOR * _VECTOR
    copied = min(writes - added, reads - 2 * added)
    return Traffic(added, copied, writes - added - copied, reads - 2 * added - copied)


def _contender(variant: str, add: Add, traffic: Traffic, first: Tensor, second: Tensor, out: Tensor) -> Contender:
    lengths = [traffic.added, traffic.copied, traffic.summed]
    left, original, alone = first.split(lengths)
    total, copy, filled = out.split([traffic.added, traffic.copied, traffic.filled])

    def call() -> Tensor:
        if traffic.added:
            add(left, second, total)
        if traffic.copied:
            add(original, original, copy)  # the second read of an element comes from a register or the nearest cache
        if traffic.filled:
            filled.fill_(1.0)
        if traffic.summed:
            alone.sum()
        return out

    def expected() -> Tensor:
        return torch.cat([left.double() + second, 2 * original.double(), torch.ones_like(filled, dtype=torch.float64)])

    return Contender("floor", call, variant, expected=expected, tolerance=1e-6)


def _torch_add(a: Tensor, b: Tensor, out: Tensor) -> None:
    torch.add(a, b, out=out)


def _core_add(a: Tensor, b: Tensor, out: Tensor, nontemporal: bool) -> None:
    core.stream(a.data_ptr(), b.data_ptr(), out.data_ptr(), out.numel(), nontemporal, torch.get_num_threads())
