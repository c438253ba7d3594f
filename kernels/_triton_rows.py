"""What the Triton kernels on logits share: how rows are cut into tiles, and the mean over rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stablekd_fast.kernels._launch import Listed, aligned, launch, variant

NARROW = 8192
"""Classes that fit into the registers of one program; wider rows are read in chunks, twice if a gradient is wanted."""

CHUNK = 4096
"""Classes of a wide row that are worked on at a time."""

BLOCKS = (16, 64, 256, 1024, 2048, 4096, 8192)
"""Widths of a tile: the smallest that holds a row."""

TILE = 2048
"""Elements that a tile has at least, by taking several short rows."""

ALIGNMENTS = (1, 4, 8)
"""Multiples that all row strides may be known to be: 8 elements of 16 bits or 4 of 32 are one 128-bit access."""

MEAN_BLOCK = 1024


def tile(classes: int) -> dict[str, int]:
    """Rows and width of the tile for rows of `classes` <= NARROW."""
    block = next(width for width in BLOCKS if width >= classes)
    return {"ROWS": max(1, TILE // block), "BLOCK": block}


def tiles() -> list[dict[str, int]]:
    """Every tile that `tile` can choose."""
    return [tile(block) for block in BLOCKS]


def warps(tile: dict[str, int]) -> int:
    """Enough threads that each holds at most 16 elements of a tile."""
    return min(16, max(4, tile["ROWS"] * tile["BLOCK"] // 512))


def alignment(*strides: int) -> int:
    return next(known for known in reversed(ALIGNMENTS) if all(stride % known == 0 for stride in strides))


def as_rows(matrix: Tensor) -> Tensor:
    """`matrix` `[N, C]` with the elements of a row side by side and its memory aligned, copied only where it is not."""
    return aligned(matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous())


@triton.jit(do_not_specialize=["count"])
def mean_kernel(
    values,  # float32 [count]
    upstream,  # float [] or None
    out,  # float32 []
    count: tl.int64,
    factor,
    BLOCK: tl.constexpr,
):
    """factor * upstream * mean(values), added up in one fixed order."""
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, count, BLOCK):
        inside = start + lanes < count
        total += tl.load(values + start + lanes, mask=inside, other=0.0)
    mean = tl.sum(total, axis=0) / count.to(tl.float32) * factor
    if upstream is not None:
        mean = mean * tl.load(upstream)
    tl.store(out, mean)


def mean(values: Tensor, factor: float, upstream: Tensor | None) -> Tensor:
    out = torch.empty((), dtype=torch.float32, device=values.device)
    arguments = dict(values=values, upstream=upstream, out=out, count=values.numel(), factor=float(factor))
    launch(mean_kernel, (1,), arguments, {"BLOCK": MEAN_BLOCK}, warps=4)
    return out


def mean_specialisations() -> list[Listed]:
    single = torch.float32
    return [
        Listed(
            mean_kernel,
            variant(
                mean_kernel,
                dict(values=single, upstream=upstream, out=single, count=1, factor=1.0),
                {"BLOCK": MEAN_BLOCK},
                4,
            ),
        )
        for upstream in (single, None)
    ]


@triton.jit
def online(top, total, values, inverse_temperature):
    """Running maximum and sum of exp((x - maximum) / temperature) over rows of chunks; -inf adds nothing.

    Also gives what earlier sums are to be multiplied by.
    """
    new_top = tl.maximum(top, tl.max(values, axis=0))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    shrink = tl.exp((top - base) * inverse_temperature)
    total = total * shrink + tl.sum(tl.exp((values - base) * inverse_temperature), axis=0)
    return new_top, total, shrink, base
