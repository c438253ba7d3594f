"""Launching Triton kernels, in one place, so that every compiled variant is known beforehand.

A Triton kernel is compiled once per combination of argument types and constants. Each `triton_impl.py` lists the
combinations that it can reach (`specialisations()`), so that they can be compiled for chips that are not at hand; each
launch goes through `launch`, and the tests check that none leaves the lists. Two rules keep the lists short: integers
are `tl.int64` and not specialised on their value, and pointers are aligned to 16 bytes (`aligned` copies the rare
tensor that is not).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}
"""Triton's names of pointers. float8_e4m3fn travels as uint8: chips below sm_89 have no such type in Triton."""


@dataclass(frozen=True)
class Specialisation:
    """One compiled variant: argument name -> Triton type or None for an absent tensor, and the constants."""

    kernel: str
    types: tuple[tuple[str, str | None], ...]
    constants: tuple[tuple[str, Any], ...]
    warps: int


@dataclass(frozen=True)
class Listed:
    """A variant that the dispatcher can reach, and whether it promises global loads and stores of 128 bits."""

    function: Any = field(compare=False)
    variant: Specialisation
    wide_loads: bool = False
    wide_stores: bool = False


ALIGNMENTS = (8, 1)
"""The multiples that a number of elements may be promised to be; 8 makes accesses of 128 bits possible."""

REGISTERS = 128
"""The registers allowed to a thread, `maxnreg`.

Left free, the assembler spills a few to fit one more program on a processor.
"""

watchers: list[Callable[[Specialisation], None]] = []
"""Functions that are called with the variant of every launch; tests and byte counts listen here."""


def variant(kernel: Any, arguments: dict[str, Any], constants: dict[str, Any], warps: int) -> Specialisation:
    """`arguments` hold tensors (or their dtypes), None for absent tensors, ints (int64) and floats (float32)."""
    types = tuple((name, _type(value)) for name, value in arguments.items())
    return Specialisation(kernel.__name__, types, tuple(sorted(constants.items())), warps)


def launch(
    kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], constants: dict[str, Any], warps: int
) -> None:
    """Run `kernel` on `grid`."""
    for watch in watchers:
        watch(variant(kernel, arguments, constants, warps))
    kernel[grid](**arguments, **constants, num_warps=warps, maxnreg=REGISTERS)


def aligned(tensor: Tensor) -> Tensor:
    """`tensor` itself, or a copy if its memory does not begin at a multiple of 16 bytes."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def packed(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """`tensor` in `dtype`, contiguous and aligned."""
    return None if tensor is None else aligned(tensor.to(dtype).contiguous())


def alignment(*extents: int, widths: tuple[int, ...] = ALIGNMENTS) -> int:
    """The largest of `widths` that divides all `extents`: what the compiler may be promised."""
    return next(width for width in widths if all(extent % width == 0 for extent in extents))


def _type(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, Tensor):
        value = value.dtype
    if isinstance(value, torch.dtype):
        return POINTERS[value]
    return "fp32" if isinstance(value, float) else "i64"
