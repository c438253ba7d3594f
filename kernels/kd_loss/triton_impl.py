"""`kd_loss` by Triton.

A program keeps whole rows in registers: student and teacher are read once, the gradient is written once. Rows of more
than `NARROW` classes are walked in chunks, once for the sums and once more for the gradient: two reads of both.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from stablekd_fast.kernels._launch import Listed, aligned, launch, variant
from stablekd_fast.kernels._triton_rows import (
    ALIGNMENTS,
    CHUNK,
    NARROW,
    alignment,
    as_rows,
    mean,
    mean_specialisations,
    online,
    tile,
    tiles,
    warps,
)
from stablekd_fast.kernels.kd_loss import reference

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_INTEGERS = ["samples", "classes", "student_stride", "teacher_stride", "kept"]


@triton.jit
def _spread(named, mass, open_, kept_p):
    """Kept probabilities, and what they lack to 1 evenly over the open classes that are not named; rows on axis 0."""
    others = open_ & (named == 0)
    count = tl.maximum(tl.sum(others.to(tl.float32), axis=1), 1.0)
    rest = tl.maximum(1.0 - mass, 0.0) / count
    return tl.where(named != 0, kept_p, tl.where(others, rest[:, None], 0.0))


@triton.jit(do_not_specialize=_INTEGERS)
def kd_kernel(
    student,  # [samples, classes], rows student_stride apart
    teacher,  # likewise; or probabilities [samples, kept]
    indices,  # int64 [samples, kept] or None
    labels,  # int64 [samples] or None
    weight,  # float32 [samples] or None
    upstream,  # float32 [] or None
    gradient,  # [samples, classes] or None
    losses,  # float32 [samples]
    samples: tl.int64,
    classes: tl.int64,
    student_stride: tl.int64,
    teacher_stride: tl.int64,
    kept: tl.int64,
    temperature,
    alpha,
    smoothing,
    factor,  # of the gradient
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    classes = tl.multiple_of(classes, ALIGN)
    student_stride = tl.multiple_of(student_stride, ALIGN)
    teacher_stride = tl.multiple_of(teacher_stride, ALIGN)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    exists = row < samples
    inside = exists[:, None] & (col < classes)[None, :]
    minus_infinity = float("-inf")

    s = tl.load(student + row[:, None] * student_stride + col[None, :], mask=inside, other=minus_infinity).to(tl.float32)
    s_top = tl.max(s, axis=1)
    a = (s - s_top[:, None]) / temperature
    q = tl.exp(a)
    q_total = tl.sum(q, axis=1)
    q = q / q_total[:, None]

    if indices is None:
        t = tl.load(teacher + row[:, None] * teacher_stride + col[None, :], mask=inside, other=minus_infinity).to(
            tl.float32
        )
        b = (t - tl.max(t, axis=1)[:, None]) / temperature
        e = tl.exp(b)
        p_total = tl.sum(e, axis=1)
        p = e / p_total[:, None]
        # Where p is 0 the difference may be infinite or undefined, and counts nothing.
        divergence = tl.sum(tl.where(e == 0.0, 0.0, p * (b - a)), axis=1) + tl.log(q_total / p_total)
        open_ = (s != minus_infinity) | (t != minus_infinity)
        gap = q - p
    else:
        named = tl.zeros([ROWS, BLOCK], dtype=tl.int32)
        kept_p = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
        mass = tl.zeros([ROWS], dtype=tl.float32)
        for k in range(0, kept):
            index = tl.load(indices + row * kept + k, mask=exists, other=0)
            value = tl.load(teacher + row * teacher_stride + k, mask=exists, other=0.0).to(tl.float32)
            value = tl.where((index >= 0) & (index < classes), value, float("nan"))
            hit = col[None, :] == index[:, None]
            kept_p = tl.where(hit, value[:, None], kept_p)
            named = tl.where(hit, 1, named)
            mass += value
        p = _spread(named, mass, s != minus_infinity, kept_p)
        p_mass = tl.sum(p, axis=1)
        terms = tl.where(p == 0.0, 0.0, p * (tl.log(tl.where(p == 0.0, 1.0, p)) - a))
        divergence = tl.sum(terms, axis=1) + p_mass * tl.log(q_total) + 0.0 * mass
        open_ = (s != minus_infinity) | (named != 0)
        gap = q * p_mass[:, None] - p

    loss = alpha * temperature * temperature * divergence
    step = alpha * temperature * gap
    if labels is not None:
        label = tl.load(labels + row, mask=exists, other=0)
        known = (label >= 0) & (label < classes)
        hit = col[None, :] == label[:, None]
        e = tl.exp(s - s_top[:, None])
        total = tl.sum(e, axis=1)
        log_sum = s_top + tl.log(total)
        hard = log_sum - tl.sum(tl.where(hit, s, 0.0), axis=1)
        # Padding is -inf in both, hence not open.
        open_count = tl.sum(open_.to(tl.float32), axis=1)
        uniform = log_sum - tl.sum(tl.where(open_, s, 0.0), axis=1) / open_count
        # Without smoothing an infinite mean must not count.
        soft = tl.where(smoothing > 0.0, smoothing * uniform, 0.0)
        entropy = (1.0 - smoothing) * hard + soft
        loss += (1.0 - alpha) * tl.where(known, entropy, float("nan"))
        targets = tl.where(hit, 1.0 - smoothing, 0.0) + tl.where(open_, (smoothing / open_count)[:, None], 0.0)
        step += (1.0 - alpha) * (e / total[:, None] - targets)
    if weight is not None:
        sample_weight = tl.load(weight + row, mask=exists, other=0.0)
        loss = loss * sample_weight
        step = step * sample_weight[:, None]
    tl.store(losses + row, loss, mask=exists)
    if gradient is not None:
        scale = factor
        if upstream is not None:
            scale = factor * tl.load(upstream)
        out = gradient + row[:, None] * classes + col[None, :]
        tl.store(out, (step * scale).to(gradient.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_INTEGERS)
def kd_wide_kernel(
    student,  # [samples, classes], rows student_stride apart
    teacher,  # likewise; or probabilities [samples, kept]
    indices,  # int64 [samples, kept] or None
    labels,  # int64 [samples] or None
    weight,  # float32 [samples] or None
    upstream,  # float32 [] or None
    gradient,  # [samples, classes] or None
    losses,  # float32 [samples]
    samples: tl.int64,
    classes: tl.int64,
    student_stride: tl.int64,
    teacher_stride: tl.int64,
    kept: tl.int64,
    temperature,
    alpha,
    smoothing,
    factor,  # of the gradient
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """One row per program, in chunks."""
    classes = tl.multiple_of(classes, ALIGN)
    student_stride = tl.multiple_of(student_stride, ALIGN)
    teacher_stride = tl.multiple_of(teacher_stride, ALIGN)
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    lanes = tl.arange(0, BLOCK)
    minus_infinity = float("-inf")
    inverse = 1.0 / temperature

    s_top = minus_infinity
    t_top = minus_infinity
    q_total = 0.0
    p_total = 0.0
    plain_total = 0.0
    cross = 0.0  # dense: sum of exp((t - t_top) / T) * (t - s); kept: sum of p * (log p - s / T) over named classes
    named_mass = 0.0
    others_count = 0.0
    others_logits = 0.0
    open_count = 0.0
    open_logits = 0.0
    mass = 0.0
    if indices is not None:
        for k in range(0, kept):
            index = tl.load(indices + row * kept + k)
            value = tl.load(teacher + k).to(tl.float32)
            mass += tl.where((index >= 0) & (index < classes), value, float("nan"))
    for start in range(0, classes, BLOCK):
        col = start + lanes
        inside = col < classes
        s = tl.load(student + col, mask=inside, other=minus_infinity).to(tl.float32)
        plain_top, plain_total, _, _ = online(s_top, plain_total, s, 1.0)
        s_top, q_total, _, _ = online(s_top, q_total, s, inverse)
        is_open = s != minus_infinity
        if indices is None:
            t = tl.load(teacher + col, mask=inside, other=minus_infinity).to(tl.float32)
            t_top, p_total, shrink, base = online(t_top, p_total, t, inverse)
            e = tl.exp((t - base) * inverse)
            cross = cross * shrink + tl.sum(tl.where(e == 0.0, 0.0, e * (t - s)), axis=0)
            is_open = is_open | (t != minus_infinity)
        else:
            named = tl.zeros([BLOCK], dtype=tl.int32)
            p = tl.zeros([BLOCK], dtype=tl.float32)
            for k in range(0, kept):
                hit = col == tl.load(indices + row * kept + k)
                p = tl.where(hit, tl.load(teacher + k).to(tl.float32), p)
                named = tl.where(hit, 1, named)
            cross += tl.sum(tl.where(p == 0.0, 0.0, p * (tl.log(tl.where(p == 0.0, 1.0, p)) - s * inverse)), axis=0)
            named_mass += tl.sum(p, axis=0)
            others = is_open & (named == 0)
            others_count += tl.sum(others.to(tl.float32), axis=0)
            others_logits += tl.sum(tl.where(others, s, 0.0), axis=0)
            is_open = is_open | (named != 0)
        open_count += tl.sum(is_open.to(tl.float32), axis=0)
        open_logits += tl.sum(tl.where(is_open, s, 0.0), axis=0)

    q_log_sum = s_top * inverse + tl.log(q_total)
    rest = 0.0
    p_mass = 1.0
    if indices is None:
        divergence = cross / p_total * inverse - (t_top * inverse + tl.log(p_total)) + q_log_sum
    else:
        rest = tl.maximum(1.0 - mass, 0.0) / tl.maximum(others_count, 1.0)
        p_mass = named_mass + rest * others_count
        spread = rest * (others_count * tl.log(tl.where(rest > 0.0, rest, 1.0)) - others_logits * inverse)
        divergence = cross + tl.where(rest > 0.0, spread, 0.0) + p_mass * q_log_sum + 0.0 * mass
    loss = alpha * temperature * temperature * divergence
    label = tl.zeros([], dtype=tl.int64)
    if labels is not None:
        label = tl.load(labels + row)
        known = (label >= 0) & (label < classes)
        log_sum = s_top + tl.log(plain_total)
        hard = log_sum - tl.load(student + label, mask=known, other=0.0).to(tl.float32)
        uniform = log_sum - open_logits / open_count
        entropy = (1.0 - smoothing) * hard + tl.where(smoothing > 0.0, smoothing * uniform, 0.0)
        loss += (1.0 - alpha) * tl.where(known, entropy, float("nan"))
    scale = factor
    if upstream is not None:
        scale = scale * tl.load(upstream)
    if weight is not None:
        sample_weight = tl.load(weight + row)
        loss = loss * sample_weight
        scale = scale * sample_weight
    tl.store(losses + row, loss)

    if gradient is not None:
        gradient += row * classes
        for start in range(0, classes, BLOCK):
            col = start + lanes
            inside = col < classes
            s = tl.load(student + col, mask=inside, other=minus_infinity).to(tl.float32)
            is_open = s != minus_infinity
            q = tl.exp((s - s_top) * inverse) / q_total
            if indices is None:
                t = tl.load(teacher + col, mask=inside, other=minus_infinity).to(tl.float32)
                p = tl.exp((t - t_top) * inverse) / p_total
                is_open = is_open | (t != minus_infinity)
            else:
                p = tl.where(is_open, rest, 0.0)
                for k in range(0, kept):
                    hit = col == tl.load(indices + row * kept + k)
                    p = tl.where(hit, tl.load(teacher + k).to(tl.float32), p)
                    is_open = is_open | hit
            step = alpha * temperature * (q * p_mass - p)
            if labels is not None:
                targets = tl.where(col == label, 1.0 - smoothing, 0.0) + tl.where(is_open, smoothing / open_count, 0.0)
                step += (1.0 - alpha) * (tl.exp(s - s_top) / plain_total - targets)
            tl.store(gradient + col, (step * scale).to(gradient.dtype.element_ty), mask=inside)


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
    if not _fits(student, teacher):
        return reference.kd_loss(student, teacher, indices, labels, temperature, alpha, label_smoothing, weight)
    losses = _losses(
        student, teacher, indices, labels, temperature, alpha, label_smoothing, weight, 1.0, None, None
    )
    return mean(losses, 1.0, None)


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
    if not _fits(student, teacher):
        return reference.kd_loss_with_grad(
            student, teacher, indices, labels, temperature, alpha, label_smoothing, weight, factor, upstream
        )
    upstream = None if upstream is None else upstream.float()
    gradient = torch.empty_like(student)
    into = gradient if gradient.is_contiguous() else torch.empty_like(student, memory_format=torch.contiguous_format)
    losses = _losses(
        student, teacher, indices, labels, temperature, alpha, label_smoothing, weight, factor, upstream, into
    )
    return mean(losses, factor, upstream), gradient if into is gradient else gradient.copy_(into)


def _fits(student: Tensor, teacher: Tensor) -> bool:
    """The kernels compute in single precision; empty batches have no mean, as the reference says."""
    return student.dtype in FLOATS and teacher.dtype in FLOATS and student.numel() > 0


def _losses(
    student: Tensor,
    teacher: Tensor,
    indices: Tensor | None,
    labels: Tensor | None,
    temperature: float,
    alpha: float,
    smoothing: float,
    weight: Tensor | None,
    factor: float,
    upstream: Tensor | None,
    gradient: Tensor | None,
) -> Tensor:
    """Each row's loss, float32 `[N]`; the gradient of their mean times `factor` and `upstream` goes to `gradient`."""
    student, teacher = as_rows(student), as_rows(teacher)
    samples, classes = student.shape
    losses = torch.empty(samples, dtype=torch.float32, device=student.device)
    arguments = dict(
        student=student,
        teacher=teacher,
        indices=None if indices is None else aligned(indices.contiguous()),
        labels=None if labels is None else aligned(labels.contiguous()),
        weight=None if weight is None else aligned(weight.float().contiguous()),
        upstream=upstream,
        gradient=gradient,
        losses=losses,
        samples=samples,
        classes=classes,
        student_stride=student.stride(0),
        teacher_stride=teacher.stride(0),
        kept=0 if indices is None else indices.shape[1],
        temperature=float(temperature),
        alpha=1.0 if labels is None else float(alpha),
        smoothing=float(smoothing),
        factor=factor / samples,
    )
    strides = [classes, student.stride(0)] + ([] if indices is not None else [teacher.stride(0)])
    known = {"ALIGN": alignment(*strides)}
    if indices is not None:
        # The stride of kept probabilities is known to be a multiple of nothing.
        known = {"ALIGN": 1}
    if classes > NARROW:
        launch(kd_wide_kernel, (samples,), arguments, {"BLOCK": CHUNK, **known}, warps=8)
    else:
        cut = tile(classes)
        launch(kd_kernel, (triton.cdiv(samples, cut["ROWS"]),), arguments, {**cut, **known}, warps(cut))
    return losses


def specialisations() -> Iterator[Listed]:
    """Every variant that a launch can reach."""
    yield from mean_specialisations()
    shapes = [(kd_kernel, cut, warps(cut)) for cut in tiles()] + [(kd_wide_kernel, {"BLOCK": CHUNK}, 8)]
    optional = list(product((torch.int64, None), (torch.float32, None), ("backward", "given", None)))
    for (kernel, cut, width), s, t, (labels, weight, mode), top_k, align in product(
        shapes, FLOATS, FLOATS, optional, (False, True), ALIGNMENTS
    ):
        if top_k and align != 1:
            continue
        arguments = dict(
            student=s,
            teacher=t,
            indices=torch.int64 if top_k else None,
            labels=labels,
            weight=weight,
            upstream=torch.float32 if mode == "backward" else None,
            gradient=s if mode else None,
            losses=torch.float32,
            **dict.fromkeys(("samples", "classes", "student_stride", "teacher_stride", "kept"), 1),
            **dict.fromkeys(("temperature", "alpha", "smoothing", "factor"), 1.0),
        )
        yield Listed(kernel, variant(kernel, arguments, {**cut, "ALIGN": align}, width), vectorised=align == 8)
