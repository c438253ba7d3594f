"""`standardised_kd_loss` by Triton: reads each logit once and writes each gradient once.

Rows stay in registers from their means to their gradients; those of more than 4096 classes do not fit there and are
left to the reference. Per row 4 bytes of loss are written and read again.
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
    alignment,
    as_rows,
    compare,
    rounded_rate,
    tiling,
    tilings,
)
from stablekd_fast.kernels.standardised_kd_loss import reference
from stablekd_fast.kernels.standardised_kd_loss.reference import Operands

WIDEST = 4096
"""Classes of a row that are held in registers."""

EPSILON = tl.constexpr(reference.DEVIATION_EPSILON)

_INTEGERS = ("samples", "classes", "student_stride", "teacher_stride")
_NUMBERS = ("rate", "kl_scale", "kl_slope", "hard_scale", "scale")


@triton.jit(do_not_specialize=list(_INTEGERS))
def standardised_rows(
    student_at,  # [N, C], rows student_stride apart
    teacher_at,  # [N, C], rows teacher_stride apart
    labels_at,  # int64 [N] or None
    upstream_at,  # float32 [] or None
    gradient_at,  # [N, C] in the student's dtype, or None
    losses_at,  # float32 [N]
    samples: tl.int64,
    classes: tl.int64,
    student_stride: tl.int64,
    teacher_stride: tl.int64,
    rate,
    kl_scale,
    kl_slope,
    hard_scale,
    scale,
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
    student = tl.load(student_rows + cols, mask=inside, other=0.0).to(tl.float32)
    teacher = tl.load(teacher_rows + cols, mask=inside, other=0.0).to(tl.float32)

    count = classes.to(tl.float32)
    apart, deviation = deviations(student, inside, count)
    teacher_apart, teacher_deviation = deviations(teacher, inside, count)
    share = 1 / (deviation + EPSILON)
    z = tl.where(inside, apart * share[:, None], -float("inf"))
    of_teacher = tl.where(inside, teacher_apart * (1 / (teacher_deviation + EPSILON))[:, None], -float("inf"))
    q, q_sum, _, p, p_sum, _, kl = compare(z, of_teacher, rate)
    loss = kl_scale * kl

    factor = tl.where(present, 1.0, 0.0)
    if labels_at is not None:
        label = tl.load(labels_at + rows, mask=present, other=0)
        factor = tl.where((label >= 0) & (label < classes), factor, float("nan"))
        is_label = cols == label.to(tl.int32)[:, None]
        # What lies apart from the mean is as good as the logits themselves, as only differences count.
        logits = tl.where(inside, apart, -float("inf"))
        logits = logits - tl.max(logits, 1)[:, None]
        hard = tl.exp(logits)
        hard_sum = tl.sum(hard, 1)
        loss += hard_scale * (tl.log(hard_sum) - tl.sum(tl.where(is_label, logits, 0.0), 1))
    tl.store(losses_at + rows, factor * loss, mask=present)

    if gradient_at is not None:
        factor *= scale
        if upstream_at is not None:
            factor *= tl.load(upstream_at)
        # The slopes sum to 0, so that the mean's derivative takes nothing off them. The deviation's takes what moves
        # along with the logits, and nothing where there is none.
        slope = kl_slope * (q * (1 / q_sum)[:, None] - p * (1 / p_sum)[:, None])
        along = tl.sum(tl.where(inside, slope * apart, 0.0), 1) * share / ((count - 1) * deviation)
        along = tl.where(deviation == 0, 0.0, along)
        gradient = (slope - apart * along[:, None]) * share[:, None]
        if labels_at is not None:
            gradient += hard_scale * (hard * (1 / hard_sum)[:, None] - tl.where(is_label, 1.0, 0.0))
        gradient_rows = gradient_at + (rows * (classes // ALIGN * ALIGN))[:, None]
        tl.store(gradient_rows + cols, (factor[:, None] * gradient).to(gradient_at.dtype.element_ty), mask=inside)


@triton.jit
def deviations(logits, inside, count):
    """What lies apart from the mean of each row of a `[ROWS, BLOCK]` tile, 0 outside, and standard deviations
    `[ROWS]`."""
    mean = tl.sum(logits, 1) / count
    apart = tl.where(inside, logits - mean[:, None], 0.0)
    return apart, tl.sqrt(tl.sum(apart * apart, 1) / (count - 1))


def standardised_kd_loss(given: Operands) -> Tensor:
    if not _fits(given):
        return reference.standardised_kd_loss(given)
    return _run(given, 1.0, None, None)


def standardised_kd_loss_with_grad(given: Operands, factor: float, upstream: Tensor | None) -> tuple[Tensor, Tensor]:
    if not _fits(given):
        return reference.standardised_kd_loss_with_grad(given, factor, upstream)
    gradient = row_by_row(given.student)
    loss = _run(given, factor, upstream, gradient)
    return loss, laid_out_like(gradient, given.student)


def specialisations() -> Iterator[Listed]:
    yield from _triton_finish.specialisations()
    flags = product((None, torch.int64), ((False, None), (True, None), (True, torch.float32)))
    for labels, (has_gradient, upstream) in flags:
        for (tile, align), student, teacher in product(tilings(WIDEST), FLOATS, FLOATS):
            gradient = student if has_gradient else None
            tensors = (student, teacher, labels, upstream, gradient, torch.float32)
            arguments = _arguments(tensors, [0] * len(_INTEGERS), [0.0] * len(_NUMBERS))
            wide = align * min(student.itemsize, teacher.itemsize) >= 16
            yield Listed(
                standardised_rows,
                variant(standardised_rows, arguments, {**tile.constants, "ALIGN": align}, tile.warps),
                wide_loads=wide,
                wide_stores=wide and has_gradient,
            )


def _fits(given: Operands) -> bool:
    return in_single_precision(given.student, given.teacher) and given.student.shape[1] <= WIDEST


def _run(given: Operands, factor: float, upstream: Tensor | None, gradient: Tensor | None) -> Tensor:
    samples, classes = given.student.shape
    student, teacher, labels = as_rows(given.student), as_rows(given.teacher), packed(given.labels, torch.int64)
    upstream = packed(upstream, torch.float32)
    losses = torch.empty(samples, dtype=torch.float32, device=student.device)
    strides = (student.stride(0), teacher.stride(0))
    rate, temperature = rounded_rate(given.temperature)
    weights = (given.kl_weight * temperature**2, given.kl_weight * temperature, given.ce_weight)
    arguments = _arguments(
        (student, teacher, labels, upstream, gradient, losses),
        (samples, classes, *strides),
        (rate, *weights, factor / samples),
    )
    align = alignment(classes, *strides)
    tile = tiling(classes, align)
    constants = {**tile.constants, "ALIGN": align}
    launch(standardised_rows, (triton.cdiv(samples, tile.rows),), arguments, constants, tile.warps)
    return _triton_finish.total(losses, factor / samples, upstream)


def _arguments(tensors, integers, numbers) -> dict:
    names = ("student", "teacher", "labels", "upstream", "gradient", "losses")
    arguments = {f"{name}_at": tensor for name, tensor in zip(names, tensors)}
    return arguments | dict(zip(_INTEGERS, map(int, integers))) | dict(zip(_NUMBERS, map(float, numbers)))
