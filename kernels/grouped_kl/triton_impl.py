"""`grouped_kl` by Triton: reads each logit once and writes each gradient once.

The primary group ends at a logit that is found by halving: 32 sums over the row, which stays in registers, decide the
32 bits of its number. Rows of more than 4096 classes do not fit there and are left to the reference, which sorts them.
Per row 4 bytes of loss are written and read again.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from stablekd_fast.kernels import _triton_finish
from stablekd_fast.kernels._checks import FLOATS, laid_out_like
from stablekd_fast.kernels._launch import Listed, launch, packed, variant
from stablekd_fast.kernels._logits import in_single_precision, row_by_row
from stablekd_fast.kernels._logits_triton import (
    LN2,
    alignment,
    as_rows,
    finite,
    rounded_rate,
    tiling,
    tilings,
    two_way,
)
from stablekd_fast.kernels.grouped_kl import reference
from stablekd_fast.kernels.grouped_kl.reference import Operands

WIDEST = 4096
"""Classes of a row; with 8192 some variants need more registers than there are."""

_INTEGERS = ("samples", "classes", "student_stride", "teacher_stride")
_NUMBERS = ("rate", "threshold", "primary_weight", "binary_weight", "loss_scale", "slope")


@triton.jit(do_not_specialize=list(_INTEGERS))
def grouped_rows(
    student_at,  # [N, C], rows student_stride apart
    teacher_at,  # [N, C], rows teacher_stride apart
    upstream_at,  # float32 [] or None
    gradient_at,  # [N, C] in the student's dtype, or None
    losses_at,  # float32 [N]
    samples: tl.int64,
    classes: tl.int64,
    student_stride: tl.int64,
    teacher_stride: tl.int64,
    rate,
    threshold,
    primary_weight,
    binary_weight,
    loss_scale,
    slope,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Losses and gradients of ROWS rows held in registers."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    present = rows < samples
    cols = tl.arange(0, BLOCK)[None, :]
    # Dividing and multiplying tells the compiler of the multiples that vector loads and stores need.
    within = present[:, None] & (cols < (classes // ALIGN * ALIGN).to(tl.int32))
    student_rows = student_at + (rows * (student_stride // ALIGN * ALIGN))[:, None]
    teacher_rows = teacher_at + (rows * (teacher_stride // ALIGN * ALIGN))[:, None]
    student = tl.load(student_rows + cols, mask=within, other=-float("inf")).to(tl.float32)
    teacher = tl.load(teacher_rows + cols, mask=within, other=-float("inf")).to(tl.float32)

    teacher_top = tl.max(teacher, 1)
    p = tl.exp2((teacher - teacher_top[:, None]) * rate)
    inside = primary_group(teacher, p, threshold * tl.sum(p, 1), ROWS, BLOCK)
    p_in = tl.sum(tl.where(inside, p, 0.0), 1)
    p_out = tl.sum(tl.where(inside, 0.0, p), 1)
    # Each group's exponentials of the student are relative to its own largest logit.
    top_in = finite(tl.max(tl.where(inside, student, -float("inf")), 1))
    top_out = finite(tl.max(tl.where(inside, -float("inf"), student), 1))
    below = (student - tl.where(inside, top_in[:, None], top_out[:, None])) * rate
    q = tl.exp2(below)
    q_in = tl.sum(tl.where(inside, q, 0.0), 1)
    q_out = tl.sum(tl.where(inside, 0.0, q), 1)
    cross = tl.sum(tl.where(inside & (p > 0), p * ((teacher - teacher_top[:, None]) * rate - below), 0.0), 1)

    # Where the student excludes the whole group its share of it is 0, and so is every class's share inside.
    inner = tl.where(q_in > 0, LN2 * cross / p_in + tl.log(q_in / p_in), float("inf"))
    odds_of_q = (top_in - top_out) * rate + tl.log2(q_in) - tl.log2(q_out)
    binary, gap, mass = two_way(odds_of_q, tl.log2(p_in) - tl.log2(p_out))
    tl.store(losses_at + rows, loss_scale * (binary_weight * binary + primary_weight * mass * inner), mask=present)

    if gradient_at is not None:
        factor = slope + tl.zeros([ROWS], tl.float32)
        if upstream_at is not None:
            factor *= tl.load(upstream_at)
        of_q = tl.where(q_in > 0, factor * (binary_weight * gap + primary_weight * mass) / q_in, 0.0)
        of_q_outside = tl.where(q_out > 0, -factor * binary_weight * gap / q_out, 0.0)
        of_p = factor * primary_weight * mass / p_in
        gradient = tl.where(inside, q * of_q[:, None] - p * of_p[:, None], q * of_q_outside[:, None])
        gradient_rows = gradient_at + (rows * (classes // ALIGN * ALIGN))[:, None]
        tl.store(gradient_rows + cols, gradient.to(gradient_at.dtype.element_ty), mask=within)


@triton.jit
def primary_group(teacher, p, needed, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Which classes of a `[ROWS, BLOCK]` tile are in the primary group: as few of the largest as have `needed` `[ROWS]`
    of the exponentials `p` together, of equal ones the first."""
    # Numbers in the order of their logits; -0.0 is 0.0.
    bits = tl.where(teacher == 0.0, 0.0, teacher).to(tl.int32, bitcast=True)
    number = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    # What lies above `low` reaches what is needed, what lies above `high` does not.
    high = tl.max(number, 1)
    low = tl.zeros([ROWS], tl.int32) - 0x7FFFFFFF
    for _ in range(32):
        middle = (low & high) + ((low ^ high) >> 1)
        less = tl.sum(tl.where(number > middle[:, None], p, 0.0), 1) < needed
        high = tl.where(less, middle, high)
        low = tl.where(less, low, middle)
    above = number > high[:, None]
    equal = number == high[:, None]
    before = tl.sum(tl.where(above, p, 0.0), 1)
    mass = tl.max(tl.where(equal, p, 0.0), 1)
    # The k-th of equal classes, from 0, is taken where what lies before it does not reach: `before` + k * `mass`.
    rank = tl.cumsum(equal.to(tl.int32), 1) - 1
    return above | (equal & (before[:, None] + rank.to(tl.float32) * mass[:, None] < needed[:, None]))


def grouped_kl(given: Operands) -> Tensor:
    if not _fits(given):
        return reference.grouped_kl(given)
    return _run(given, 1.0, None, None)


def grouped_kl_with_grad(given: Operands, factor: float, upstream: Tensor | None) -> tuple[Tensor, Tensor]:
    if not _fits(given):
        return reference.grouped_kl_with_grad(given, factor, upstream)
    gradient = row_by_row(given.student)
    loss = _run(given, factor, upstream, gradient)
    return loss, laid_out_like(gradient, given.student)


def specialisations() -> Iterator[Listed]:
    yield from _triton_finish.specialisations()
    for (tile, align), student, teacher, (has_gradient, upstream) in product(
        tilings(WIDEST), FLOATS, FLOATS, ((False, None), (True, None), (True, torch.float32))
    ):
        gradient = student if has_gradient else None
        tensors = (student, teacher, upstream, gradient, torch.float32)
        arguments = _arguments(tensors, [0] * len(_INTEGERS), [0.0] * len(_NUMBERS))
        wide = align * min(student.itemsize, teacher.itemsize) >= 16
        yield Listed(
            grouped_rows,
            variant(grouped_rows, arguments, {**tile.constants, "ALIGN": align}, tile.warps),
            wide_loads=wide,
            wide_stores=wide and has_gradient,
        )


def _fits(given: Operands) -> bool:
    return in_single_precision(given.student, given.teacher) and given.student.shape[1] <= WIDEST


def _run(given: Operands, factor: float, upstream: Tensor | None, gradient: Tensor | None) -> Tensor:
    samples, classes = given.student.shape
    student, teacher = as_rows(given.student), as_rows(given.teacher)
    upstream = packed(upstream, torch.float32)
    losses = torch.empty(samples, dtype=torch.float32, device=student.device)
    strides = (student.stride(0), teacher.stride(0))
    rate, temperature = rounded_rate(given.temperature)
    weights = (given.threshold, given.primary_weight, given.binary_weight)
    arguments = _arguments(
        (student, teacher, upstream, gradient, losses),
        (samples, classes, *strides),
        (rate, *weights, temperature**2, temperature * factor / samples),
    )
    align = alignment(classes, *strides)
    tile = tiling(classes, align)
    constants = {**tile.constants, "ALIGN": align}
    launch(grouped_rows, (triton.cdiv(samples, tile.rows),), arguments, constants, tile.warps)
    return _triton_finish.total(losses, factor / samples, upstream)


def _arguments(tensors, integers, numbers) -> dict:
    names = ("student", "teacher", "upstream", "gradient", "losses")
    arguments = {f"{name}_at": tensor for name, tensor in zip(names, tensors)}
    return arguments | dict(zip(_INTEGERS, map(int, integers))) | dict(zip(_NUMBERS, map(float, numbers)))
