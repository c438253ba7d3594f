"""`decoupled_kl` by Triton: reads each logit once and writes each gradient once.

Rows of more than 8192 classes are read twice where a gradient is wanted, as they do not fit into registers. Per row 4
bytes of loss are written and read again.
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
    WIDE,
    alignment,
    as_rows,
    compare,
    compare_chunk,
    divergence,
    rounded_rate,
    tiling,
    tilings,
    two_way,
)
from stablekd_fast.kernels.decoupled_kl import reference
from stablekd_fast.kernels.decoupled_kl.reference import Operands

_INTEGERS = ("samples", "classes", "student_stride", "teacher_stride")
_NUMBERS = ("rate", "alpha", "beta", "loss_scale", "slope")


@triton.jit(do_not_specialize=list(_INTEGERS))
def decoupled_rows(
    student_at,  # [N, C], rows student_stride apart
    teacher_at,  # [N, C], rows teacher_stride apart
    labels_at,  # int64 [N]
    upstream_at,  # float32 [] or None
    gradient_at,  # [N, C] in the student's dtype, or None
    losses_at,  # float32 [N]
    samples: tl.int64,
    classes: tl.int64,
    student_stride: tl.int64,
    teacher_stride: tl.int64,
    rate,
    alpha,
    beta,
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
    inside = present[:, None] & (cols < (classes // ALIGN * ALIGN).to(tl.int32))
    student_rows = student_at + (rows * (student_stride // ALIGN * ALIGN))[:, None]
    teacher_rows = teacher_at + (rows * (teacher_stride // ALIGN * ALIGN))[:, None]
    student = tl.load(student_rows + cols, mask=inside, other=-float("inf")).to(tl.float32)
    teacher = tl.load(teacher_rows + cols, mask=inside, other=-float("inf")).to(tl.float32)
    label = tl.load(labels_at + rows, mask=present, other=0)
    is_label = cols == label.to(tl.int32)[:, None]
    own_student = tl.sum(tl.where(is_label, student, 0.0), 1)
    own_teacher = tl.sum(tl.where(is_label, teacher, 0.0), 1)

    others_student = tl.where(is_label, -float("inf"), student)
    others_teacher = tl.where(is_label, -float("inf"), teacher)
    q, q_sum, student_top, p, p_sum, teacher_top, nckd = compare(others_student, others_teacher, rate)
    odds_of_q = (own_student - student_top) * rate - tl.log2(q_sum)
    tckd, gap, _ = two_way(odds_of_q, (own_teacher - teacher_top) * rate - tl.log2(p_sum))
    valid = (label >= 0) & (label < classes)
    factor = tl.where(valid, 1.0, float("nan"))
    tl.store(losses_at + rows, factor * loss_scale * (alpha * tckd + beta * nckd), mask=present)

    if gradient_at is not None:
        factor *= slope
        if upstream_at is not None:
            factor *= tl.load(upstream_at)
        gradient = q * ((beta - alpha * gap) / q_sum)[:, None] - p * (beta / p_sum)[:, None]
        gradient = factor[:, None] * tl.where(is_label, (alpha * gap)[:, None], gradient)
        gradient_rows = gradient_at + (rows * (classes // ALIGN * ALIGN))[:, None]
        tl.store(gradient_rows + cols, gradient.to(gradient_at.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=list(_INTEGERS))
def decoupled_wide_rows(
    student_at,  # [N, C], rows student_stride apart
    teacher_at,  # [N, C], rows teacher_stride apart
    labels_at,  # int64 [N]
    upstream_at,  # float32 [] or None
    gradient_at,  # [N, C] in the student's dtype, or None
    losses_at,  # float32 [N]
    samples: tl.int64,
    classes: tl.int64,
    student_stride: tl.int64,
    teacher_stride: tl.int64,
    rate,
    alpha,
    beta,
    loss_scale,
    slope,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Loss and gradient of one row (ROWS is 1), read twice in chunks."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    classes = classes // ALIGN * ALIGN
    student_rows = student_at + (rows * (student_stride // ALIGN * ALIGN))[:, None]
    teacher_rows = teacher_at + (rows * (teacher_stride // ALIGN * ALIGN))[:, None]
    label = tl.load(labels_at + rows)
    valid = (label >= 0) & (label < classes)
    own_student = tl.load(student_at + rows * student_stride + label, mask=valid, other=0.0).to(tl.float32)
    own_teacher = tl.load(teacher_at + rows * teacher_stride + label, mask=valid, other=0.0).to(tl.float32)

    nothing = tl.zeros([ROWS], tl.float32)
    student_top, teacher_top = nothing - float("inf"), nothing - float("inf")
    q_sum, p_sum, cross = nothing, nothing, nothing
    for start in range(0, classes, BLOCK):
        cols = (start + tl.arange(0, BLOCK))[None, :]
        student = tl.load(student_rows + cols, mask=cols < classes, other=-float("inf")).to(tl.float32)
        teacher = tl.load(teacher_rows + cols, mask=cols < classes, other=-float("inf")).to(tl.float32)
        is_label = cols == label[:, None]
        student = tl.where(is_label, -float("inf"), student)
        teacher = tl.where(is_label, -float("inf"), teacher)
        q_sum, student_top, p_sum, teacher_top, cross, _ = compare_chunk(
            student, teacher, rate, q_sum, student_top, p_sum, teacher_top, cross
        )
    odds_of_q = (own_student - student_top) * rate - tl.log2(q_sum)
    tckd, gap, _ = two_way(odds_of_q, (own_teacher - teacher_top) * rate - tl.log2(p_sum))
    factor = tl.where(valid, 1.0, float("nan"))
    nckd = divergence(cross, q_sum, p_sum)
    tl.store(losses_at + rows, factor * loss_scale * (alpha * tckd + beta * nckd))

    if gradient_at is not None:
        factor *= slope
        if upstream_at is not None:
            factor *= tl.load(upstream_at)
        gradient_rows = gradient_at + (rows * classes)[:, None]
        for start in range(0, classes, BLOCK):
            cols = (start + tl.arange(0, BLOCK))[None, :]
            student = tl.load(student_rows + cols, mask=cols < classes, other=-float("inf")).to(tl.float32)
            teacher = tl.load(teacher_rows + cols, mask=cols < classes, other=-float("inf")).to(tl.float32)
            q = tl.exp2((student - student_top[:, None]) * rate)
            p = tl.exp2((teacher - teacher_top[:, None]) * rate)
            gradient = q * ((beta - alpha * gap) / q_sum)[:, None] - p * (beta / p_sum)[:, None]
            gradient = factor[:, None] * tl.where(cols == label[:, None], (alpha * gap)[:, None], gradient)
            tl.store(gradient_rows + cols, gradient.to(gradient_at.dtype.element_ty), mask=cols < classes)


def decoupled_kl(given: Operands) -> Tensor:
    if not in_single_precision(given.student, given.teacher):
        return reference.decoupled_kl(given)
    return _run(given, 1.0, None, None)


def decoupled_kl_with_grad(given: Operands, factor: float, upstream: Tensor | None) -> tuple[Tensor, Tensor]:
    if not in_single_precision(given.student, given.teacher):
        return reference.decoupled_kl_with_grad(given, factor, upstream)
    gradient = row_by_row(given.student)
    loss = _run(given, factor, upstream, gradient)
    return loss, laid_out_like(gradient, given.student)


def specialisations() -> Iterator[Listed]:
    yield from _triton_finish.specialisations()
    for (tile, align), student, teacher, (has_gradient, upstream) in product(
        tilings(), FLOATS, FLOATS, ((False, None), (True, None), (True, torch.float32))
    ):
        gradient = student if has_gradient else None
        tensors = (student, teacher, torch.int64, upstream, gradient, torch.float32)
        arguments = _arguments(tensors, [0] * len(_INTEGERS), [0.0] * len(_NUMBERS))
        kernel = _kernel(tile)
        wide = align * min(student.itemsize, teacher.itemsize) >= 16
        yield Listed(
            kernel,
            variant(kernel, arguments, {**tile.constants, "ALIGN": align}, tile.warps),
            wide_loads=wide,
            wide_stores=wide and has_gradient,
        )


def _run(given: Operands, factor: float, upstream: Tensor | None, gradient: Tensor | None) -> Tensor:
    samples, classes = given.student.shape
    student, teacher, labels = as_rows(given.student), as_rows(given.teacher), packed(given.labels, torch.int64)
    upstream = packed(upstream, torch.float32)
    losses = torch.empty(samples, dtype=torch.float32, device=student.device)
    strides = (student.stride(0), teacher.stride(0))
    rate, temperature = rounded_rate(given.temperature)
    arguments = _arguments(
        (student, teacher, labels, upstream, gradient, losses),
        (samples, classes, *strides),
        (rate, given.alpha, given.beta, temperature**2, temperature * factor / samples),
    )
    align = alignment(classes, *strides)
    tile = tiling(classes, align)
    constants = {**tile.constants, "ALIGN": align}
    launch(_kernel(tile), (triton.cdiv(samples, tile.rows),), arguments, constants, tile.warps)
    return _triton_finish.total(losses, factor / samples, upstream)


def _kernel(tile):
    return decoupled_wide_rows if tile is WIDE else decoupled_rows


def _arguments(tensors, integers, numbers) -> dict:
    names = ("student", "teacher", "labels", "upstream", "gradient", "losses")
    arguments = {f"{name}_at": tensor for name, tensor in zip(names, tensors)}
    return arguments | dict(zip(_INTEGERS, map(int, integers))) | dict(zip(_NUMBERS, map(float, numbers)))
