"""`kd_loss` by Triton: reads each logit once and writes each gradient once.

Rows of more than 8192 classes are read twice; with a top-k teacher they are left to the reference. Per row 4 bytes of
loss are written and read again. A top-k teacher costs k sweeps over the row in registers, no further bytes of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor
import triton
import triton.language as tl

from stablekd_fast.kernels import _triton_finish
from stablekd_fast.kernels._launch import Listed, launch, variant
from stablekd_fast.kernels._logits_triton import (
    _LN2,
    ALIGNMENTS,
    FLOATS,
    NARROW,
    WIDE,
    alignment,
    as_rows,
    compare,
    compare_chunk,
    divergence,
    finite,
    packed,
    rounded_rate,
    tiling,
)
from stablekd_fast.kernels.kd_loss import reference

_INTEGERS = ("samples", "classes", "kept", "student_stride", "teacher_stride")
_NUMBERS = ("rate", "kl_scale", "kl_slope", "hard_scale", "smoothing", "scale")


@triton.jit(do_not_specialize=list(_INTEGERS))
def kd_rows(
    student_at,  # [N, C], rows student_stride apart
    teacher_at,  # [N, C] logits, rows teacher_stride apart; with indices [N, kept] probabilities
    indices_at,  # int64 [N, kept] or None
    labels_at,  # int64 [N] or None
    weight_at,  # float32 [N] or None
    upstream_at,  # float32 [] or None
    gradient_at,  # [N, C] in the student's dtype, or None
    losses_at,  # float32 [N]
    samples: tl.int64,
    classes: tl.int64,
    kept: tl.int64,
    student_stride: tl.int64,
    teacher_stride: tl.int64,
    rate,
    kl_scale,
    kl_slope,
    hard_scale,
    smoothing,
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
    inside = present[:, None] & (cols < classes // ALIGN * ALIGN)
    student_rows = student_at + (rows * (student_stride // ALIGN * ALIGN))[:, None]
    student = tl.load(student_rows + cols, mask=inside, other=-float("inf")).to(tl.float32)
    factor = row_factor(weight_at, rows, present)

    if indices_at is None:
        teacher_rows = teacher_at + (rows * (teacher_stride // ALIGN * ALIGN))[:, None]
        teacher = tl.load(teacher_rows + cols, mask=inside, other=-float("inf")).to(tl.float32)
        q, q_sum, top, p, p_sum, _, kl = compare(student, teacher, rate)
        masked = (student == -float("inf")) & (teacher == -float("inf"))
        p *= (1 / p_sum)[:, None]
        mass = tl.full([ROWS], 1.0, tl.float32)
    else:
        p, masked, valid = top_k(teacher_at, indices_at, student, cols, rows, present, kept, classes, ROWS, BLOCK)
        factor = tl.where(valid, factor, float("nan"))
        top = tl.max(student, 1)
        log_q = (student - top[:, None]) * rate
        q = tl.exp2(log_q)
        q_sum = tl.sum(q, 1)
        log_q = log_q * _LN2 - tl.log(q_sum)[:, None]
        kl = tl.sum(tl.where(p <= 0, 0.0, p * (tl.log(p) - log_q)), 1)
        mass = tl.sum(p, 1)
    loss = kl_scale * kl

    if labels_at is not None:
        label = tl.load(labels_at + rows, mask=present, other=0)
        factor = tl.where((label >= 0) & (label < classes), factor, float("nan"))
        is_label = cols == label[:, None]
        logits = student - top[:, None]
        hard = tl.exp(logits)
        hard_sum = tl.sum(hard, 1)
        open_classes = tl.sum((~masked).to(tl.float32), 1)
        own = tl.sum(tl.where(is_label, logits, 0.0), 1)
        flat = tl.sum(tl.where(masked, 0.0, logits), 1)
        loss += hard_scale * cross_entropy(own, flat, hard_sum, open_classes, smoothing)

    tl.store(losses_at + rows, factor * loss, mask=present)
    if gradient_at is not None:
        factor *= scale
        if upstream_at is not None:
            factor *= tl.load(upstream_at)
        gradient = kl_slope * (q * (mass / q_sum)[:, None] - p)
        if labels_at is not None:
            even = tl.where(masked, 0.0, (smoothing / open_classes)[:, None])
            targets = tl.where(is_label, even + (1 - smoothing), even)
            gradient += hard_scale * (hard * (1 / hard_sum)[:, None] - targets)
        gradient_rows = gradient_at + (rows * (classes // ALIGN * ALIGN))[:, None]
        tl.store(gradient_rows + cols, (factor[:, None] * gradient).to(gradient_at.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=list(_INTEGERS))
def kd_wide_rows(
    student_at,  # [N, C], rows student_stride apart
    teacher_at,  # [N, C], rows teacher_stride apart
    indices_at,  # None
    labels_at,  # int64 [N] or None
    weight_at,  # float32 [N] or None
    upstream_at,  # float32 [] or None
    gradient_at,  # [N, C] in the student's dtype, or None
    losses_at,  # float32 [N]
    samples: tl.int64,
    classes: tl.int64,
    kept: tl.int64,
    student_stride: tl.int64,
    teacher_stride: tl.int64,
    rate,
    kl_scale,
    kl_slope,
    hard_scale,
    smoothing,
    scale,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Loss and gradient of one row, read twice in chunks."""
    rows = tl.program_id(0).to(tl.int64) + tl.arange(0, ROWS)
    classes = classes // ALIGN * ALIGN
    student_rows = student_at + (rows * (student_stride // ALIGN * ALIGN))[:, None]
    teacher_rows = teacher_at + (rows * (teacher_stride // ALIGN * ALIGN))[:, None]
    factor = row_factor(weight_at, rows, rows < samples)

    nothing = tl.zeros([ROWS], tl.float32)
    top, teacher_top = nothing - float("inf"), nothing - float("inf")
    q_sum, p_sum, cross, hard_sum, open_classes, flat = nothing, nothing, nothing, nothing, nothing, nothing
    for start in range(0, classes, BLOCK):
        cols = (start + tl.arange(0, BLOCK))[None, :]
        student = tl.load(student_rows + cols, mask=cols < classes, other=-float("inf")).to(tl.float32)
        teacher = tl.load(teacher_rows + cols, mask=cols < classes, other=-float("inf")).to(tl.float32)
        q_sum, top, p_sum, teacher_top, cross, moved = compare_chunk(
            student, teacher, rate, q_sum, top, p_sum, teacher_top, cross
        )
        if labels_at is not None:
            logits = student - finite(top)[:, None]
            masked = (student == -float("inf")) & (teacher == -float("inf"))
            hard_sum = hard_sum * tl.exp(moved) + tl.sum(tl.exp(logits), 1)
            flat += open_classes * moved + tl.sum(tl.where(masked, 0.0, logits), 1)
            open_classes += tl.sum((~masked).to(tl.float32), 1)
    loss = kl_scale * divergence(cross, q_sum, p_sum)

    if labels_at is not None:
        label = tl.load(labels_at + rows)
        valid = (label >= 0) & (label < classes)
        factor = tl.where(valid, factor, float("nan"))
        own = tl.load(student_at + rows * student_stride + label, mask=valid, other=0.0).to(tl.float32) - top
        loss += hard_scale * cross_entropy(own, flat, hard_sum, open_classes, smoothing)

    tl.store(losses_at + rows, factor * loss)
    if gradient_at is not None:
        factor *= scale
        if upstream_at is not None:
            factor *= tl.load(upstream_at)
        gradient_rows = gradient_at + (rows * classes)[:, None]
        for start in range(0, classes, BLOCK):
            cols = (start + tl.arange(0, BLOCK))[None, :]
            student = tl.load(student_rows + cols, mask=cols < classes, other=-float("inf")).to(tl.float32)
            teacher = tl.load(teacher_rows + cols, mask=cols < classes, other=-float("inf")).to(tl.float32)
            q = tl.exp2((student - top[:, None]) * rate) * (1 / q_sum)[:, None]
            p = tl.exp2((teacher - teacher_top[:, None]) * rate) * (1 / p_sum)[:, None]
            gradient = kl_slope * (q - p)
            if labels_at is not None:
                masked = (student == -float("inf")) & (teacher == -float("inf"))
                even = tl.where(masked, 0.0, (smoothing / open_classes)[:, None])
                targets = tl.where(cols == label[:, None], even + (1 - smoothing), even)
                hard = tl.exp(student - top[:, None]) * (1 / hard_sum)[:, None]
                gradient += hard_scale * (hard - targets)
            gradient = (factor[:, None] * gradient).to(gradient_at.dtype.element_ty)
            tl.store(gradient_rows + cols, gradient, mask=cols < classes)


@triton.jit
def row_factor(weight_at, rows, present):
    """The weight of each row `[ROWS]`."""
    if weight_at is None:
        return tl.where(present, 1.0, 0.0)
    else:
        return tl.load(weight_at + rows, mask=present, other=0.0)


@triton.jit
def top_k(teacher_at, indices_at, student, cols, rows, present, kept, classes, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """A top-k teacher's p and which classes take no part, `[ROWS, BLOCK]`; whether all indices are classes `[ROWS]`."""
    p = tl.zeros([ROWS, BLOCK], tl.float32)
    named = p > 0
    total = tl.zeros([ROWS], tl.float32)
    valid = present
    for place in range(kept):
        index = tl.load(indices_at + rows * kept + place, mask=present, other=0)
        probability = tl.load(teacher_at + rows * kept + place, mask=present, other=0.0).to(tl.float32)
        here = cols == index[:, None]
        p = tl.where(here, probability[:, None], p)
        named = named | here
        total += probability
        valid = valid & (index >= 0) & (index < classes)
    excluded = student == -float("inf")
    others = (~named) & (~excluded)
    count = tl.sum(others.to(tl.float32), 1)
    rest = tl.maximum(1 - total, 0.0) / tl.maximum(count, 1.0)
    return tl.where(others, rest[:, None], p), excluded & (~named), valid


@triton.jit
def cross_entropy(own, flat, hard_sum, open_classes, smoothing):
    """`[ROWS]`, from the label's logit, the sum over the open classes' and that of exponentials, less the maximum."""
    log_sum = tl.log(hard_sum)
    uniform = tl.where(smoothing > 0, log_sum - flat / open_classes, 0.0)
    return (1 - smoothing) * (log_sum - own) + smoothing * uniform


def kd_loss(
    student: Tensor,
    teacher: Tensor,
    indices: Tensor | None,
    labels: Tensor | None,
    temperature: float,
    alpha: float,
    label_smoothing: float,
    weight: Tensor | None,
) -> Tensor:
    settings = (temperature, alpha, label_smoothing)
    if not _fits(student, teacher, indices):
        return reference.kd_loss(student, teacher, indices, labels, *settings, weight)
    return _run(student, teacher, indices, labels, *settings, weight, 1.0, None, None)


def kd_loss_with_grad(
    student: Tensor,
    teacher: Tensor,
    indices: Tensor | None,
    labels: Tensor | None,
    temperature: float,
    alpha: float,
    label_smoothing: float,
    weight: Tensor | None,
    factor: float,
    upstream: Tensor | None,
) -> tuple[Tensor, Tensor]:
    settings = (temperature, alpha, label_smoothing)
    if not _fits(student, teacher, indices):
        return reference.kd_loss_with_grad(student, teacher, indices, labels, *settings, weight, factor, upstream)
    gradient = torch.empty_like(student)
    into = gradient if gradient.is_contiguous() else torch.empty_like(student, memory_format=torch.contiguous_format)
    loss = _run(student, teacher, indices, labels, *settings, weight, factor, upstream, into)
    return loss, gradient if into is gradient else gradient.copy_(into)


def specialisations() -> Iterator[Listed]:
    yield from _triton_finish.specialisations()
    flags = product((False, True), (False, True), ((False, None), (True, None), (True, torch.float32)))
    for has_labels, has_weight, (has_gradient, upstream) in flags:
        labels = torch.int64 if has_labels else None
        weight = torch.float32 if has_weight else None
        for student, teacher, tile, align, top_k_teacher in product(
            FLOATS, FLOATS, (*NARROW, WIDE), ALIGNMENTS, (False, True)
        ):
            if top_k_teacher and tile is WIDE:
                continue
            indices = torch.int64 if top_k_teacher else None
            gradient = student if has_gradient else None
            tensors = (student, teacher, indices, labels, weight, upstream, gradient, torch.float32)
            arguments = _arguments(tensors, [0] * len(_INTEGERS), [0.0] * len(_NUMBERS))
            kernel = _kernel(tile)
            yield Listed(
                kernel,
                variant(kernel, arguments, {**tile.constants, "ALIGN": align}, tile.warps),
                vectorised=align * min(student.itemsize, student.itemsize if top_k_teacher else teacher.itemsize) >= 16,
            )


def _fits(student: Tensor, teacher: Tensor, indices: Tensor | None) -> bool:
    """The kernels compute in single precision; empty batches have no mean, as the reference says."""
    narrow = indices is None or tiling(student.shape[1]) is not WIDE
    return student.dtype in FLOATS and teacher.dtype in FLOATS and student.numel() > 0 and narrow


def _run(
    student: Tensor,
    teacher: Tensor,
    indices: Tensor | None,
    labels: Tensor | None,
    temperature: float,
    alpha: float,
    label_smoothing: float,
    weight: Tensor | None,
    factor: float,
    upstream: Tensor | None,
    gradient: Tensor | None,
) -> Tensor:
    samples, classes = student.shape
    student = as_rows(student)
    teacher = as_rows(teacher) if indices is None else packed(teacher, teacher.dtype)
    indices, labels = packed(indices, torch.int64), packed(labels, torch.int64)
    weight, upstream = packed(weight, torch.float32), packed(upstream, torch.float32)
    losses = torch.empty(samples, dtype=torch.float32, device=student.device)
    if labels is None:
        alpha = 1.0
    kept = 0 if indices is None else indices.shape[1]
    strides = (student.stride(0), teacher.stride(0))
    rate, temperature = rounded_rate(temperature)
    tile = tiling(classes)
    arguments = _arguments(
        (student, teacher, indices, labels, weight, upstream, gradient, losses),
        (samples, classes, kept, *strides),
        (rate, alpha * temperature**2, alpha * temperature, 1 - alpha, label_smoothing, factor / samples),
    )
    align = alignment(classes, *(strides if indices is None else strides[:1]))
    grid = (triton.cdiv(samples, tile.rows),)
    launch(_kernel(tile), grid, arguments, {**tile.constants, "ALIGN": align}, tile.warps)
    return _triton_finish.total(losses, factor / samples, upstream)


def _kernel(tile):
    return kd_wide_rows if tile is WIDE else kd_rows


def _arguments(tensors, integers, numbers) -> dict:
    names = ("student", "teacher", "indices", "labels", "weight", "upstream", "gradient", "losses")
    arguments = {f"{name}_at": tensor for name, tensor in zip(names, tensors)}
    return arguments | dict(zip(_INTEGERS, map(int, integers))) | dict(zip(_NUMBERS, map(float, numbers)))
