"""Helpers of the Triton losses on logits: tiles of whole rows, and the divergence between two of them.

Rows of up to 8192 classes stay in registers between loss and gradient. Wider ones pass twice, in chunks: once for
maxima and sums, which are rescaled when the maximum moves, and once for the gradient.

Exponentials are powers of two: with `rate` = log2(e) / T, exp(x / T) = 2^(x * rate).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from stablekd_fast.kernels import _launch, _logits

BLOCKS = (16, 128, 256, 512, 1024, 2048, 4096, 8192)
"""Widths of tiles that hold whole rows."""

CHUNK = 4096
"""Width of the pieces in which wider rows are read."""

ALIGNMENTS = (8, 4, 1)
"""The multiples that classes and strides may be promised to be: 16 bytes of half floats, of floats, or nothing."""

LN2 = tl.constexpr(math.log(2.0))


class Tiling(NamedTuple):
    """A way to cut rows into tiles `[rows, block]`; rows wider than `block` are read in chunks of it."""

    rows: int
    block: int
    warps: int

    @property
    def constants(self) -> dict[str, int]:
        return {"ROWS": self.rows, "BLOCK": self.block}


WIDE = Tiling(1, CHUNK, CHUNK // 256)


def tiling(classes: int, align: int) -> Tiling:
    """Eight elements for a thread, one 128-bit access of half floats, until a program has no more threads to give.

    Without alignment a thread's elements lie in different rows, each with sums of its own in registers: fewer rows.
    """
    block = next((block for block in BLOCKS if block >= classes), None)
    if block is None:
        return WIDE
    tile = 256 if align == 1 else 1024
    return Tiling(max(1, tile // block), block, min(16, max(4, block // 256)))


def tilings(widest: int = BLOCKS[-1] + 1) -> Iterator[tuple[Tiling, int]]:
    """Every tiling that can be chosen for rows of up to `widest` classes, with its alignment."""
    counts = [classes for classes in (*BLOCKS, BLOCKS[-1] + 1) if classes <= widest]
    return ((tiling(classes, align), align) for classes in counts for align in ALIGNMENTS)


def alignment(*extents: int) -> int:
    """The largest promise that holds for all `extents`: classes, and elements between one row and the next."""
    return _launch.alignment(*extents, widths=ALIGNMENTS)


def as_rows(matrix: Tensor) -> Tensor:
    """`matrix` `[N, C]`, or a copy of it, with aligned memory and the elements of a row side by side."""
    return _launch.aligned(_logits.as_rows(matrix))


def rounded_rate(temperature: float) -> tuple[float, float]:
    """`rate` as float32 holds it, and the temperature that it stands for, so that the two agree exactly."""
    (rate,) = struct.unpack("f", struct.pack("f", math.log2(math.e) / temperature))
    return rate, math.log2(math.e) / rate


@triton.jit
def compare(student, teacher, rate):
    """Return exponentials of two `[ROWS, BLOCK]` tiles relative to their maxima, sums and maxima `[ROWS]`, and
    the `divergence`."""
    student_top, teacher_top = tl.max(student, 1), tl.max(teacher, 1)
    student = (student - student_top[:, None]) * rate
    teacher = (teacher - teacher_top[:, None]) * rate
    q, p = tl.exp2(student), tl.exp2(teacher)
    q_sum, p_sum = tl.sum(q, 1), tl.sum(p, 1)
    # A class the teacher excludes adds nothing, whatever the student says.
    cross = tl.sum(tl.where(teacher == -float("inf"), 0.0, p * (teacher - student)), 1)
    return q, q_sum, student_top, p, p_sum, teacher_top, divergence(cross, q_sum, p_sum)


@triton.jit
def divergence(cross, q_sum, p_sum):
    """KL(teacher || student) `[ROWS]` by the logarithm of one ratio: both sums' own would cancel."""
    return LN2 * cross / p_sum + tl.log(q_sum / p_sum)


@triton.jit
def compare_chunk(student, teacher, rate, q_sum, student_top, p_sum, teacher_top, cross):
    """The sums of `compare` with one more chunk `[1, BLOCK]` in them, and how far each maximum moved (at most 0)."""
    student_top, student_moved = raised(student_top, student)
    teacher_top, teacher_moved = raised(teacher_top, teacher)
    student = (student - finite(student_top)[:, None]) * rate
    teacher = (teacher - finite(teacher_top)[:, None]) * rate
    p = tl.exp2(teacher)
    decay = tl.exp2(teacher_moved * rate)
    cross = decay * (cross + p_sum * (teacher_moved - student_moved) * rate)
    cross += tl.sum(tl.where(teacher == -float("inf"), 0.0, p * (teacher - student)), 1)
    q_sum = q_sum * tl.exp2(student_moved * rate) + tl.sum(tl.exp2(student), 1)
    p_sum = p_sum * decay + tl.sum(p, 1)
    return q_sum, student_top, p_sum, teacher_top, cross, student_moved


@triton.jit
def raised(top, values):
    """The maximum `[1]` of `top` and of the chunk, and by how much sums relative to it change: old less new."""
    new = tl.maximum(top, tl.max(values, 1))
    # Nothing but excluded classes so far: the sums are zero and need no shift.
    return new, tl.where(top == -float("inf"), 0.0, top - new)


@triton.jit
def finite(top):
    """A maximum that may be subtracted even from excluded classes alone."""
    return tl.where(top == -float("inf"), 0.0, top)


@triton.jit
def two_way(odds_of_q, odds_of_p):
    """Divergence between the distributions over two halves of the classes, of teacher and student, then q - p and p of
    the first half; `[ROWS]` all. They come as log2 of a half's probability over that of the other."""
    log_q, log_q_rest, q, q_rest = of_odds(odds_of_q)
    log_p, log_p_rest, p, p_rest = of_odds(odds_of_p)
    # Of two numbers near 1 the difference is less exact than that of what they lack.
    gap = tl.where(p > 0.5, p_rest - q_rest, q - p)
    # A half that is impossible for the teacher adds nothing, whatever the student says.
    first = tl.where(p > 0, p * (log_p - log_q), 0.0)
    return first + tl.where(p_rest > 0, p_rest * (log_p_rest - log_q_rest), 0.0), gap, p


@triton.jit
def of_odds(odds):
    """log p, log(1 - p), p and 1 - p `[ROWS]` from log2 of p / (1 - p)."""
    less = tl.exp2(-tl.abs(odds))
    log_more = -tl.log(1 + less)
    likely = odds > 0
    p, rest = tl.where(likely, 1.0, less) / (1 + less), tl.where(likely, less, 1.0) / (1 + less)
    return tl.minimum(odds, 0.0) * LN2 + log_more, tl.minimum(-odds, 0.0) * LN2 + log_more, p, rest
