"""The Triton kernels of `kd_loss`: one for rows that fit into registers, one for wider rows."""

from __future__ import annotations

import triton
import triton.language as tl

from stablekd_fast.kernels._logits_triton import LN2, compare, compare_chunk, divergence, finite, raised

INTEGERS = ("samples", "classes", "kept", "student_stride", "teacher_stride")
NUMBERS = ("rate", "kl_scale", "kl_slope", "hard_scale", "smoothing", "scale")

UNNAMED = tl.constexpr(-1.0)
"""Stands for the probability of a class that a top-k teacher does not name."""


@triton.jit(do_not_specialize=list(INTEGERS))
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
    inside = present[:, None] & (cols < (classes // ALIGN * ALIGN).to(tl.int32))
    student_rows = student_at + (rows * (student_stride // ALIGN * ALIGN))[:, None]
    student = tl.load(student_rows + cols, mask=inside, other=-float("inf")).to(tl.float32)
    valid = present

    if indices_at is None:
        teacher_rows = teacher_at + (rows * (teacher_stride // ALIGN * ALIGN))[:, None]
        teacher = tl.load(teacher_rows + cols, mask=inside, other=-float("inf")).to(tl.float32)
        q, q_sum, top, p, p_sum, _, kl = compare(student, teacher, rate)
        masked = (student == -float("inf")) & (teacher == -float("inf"))
        p *= (1 / p_sum)[:, None]
        mass = tl.full([ROWS], 1.0, tl.float32)
    else:
        total, valid = kept_mass(teacher_at, indices_at, rows, present, kept, classes)
        p = kept_tile(teacher_at, indices_at, cols, rows, present, kept, ROWS, BLOCK)
        others = (p == UNNAMED) & (student != -float("inf"))
        masked = (p == UNNAMED) & (student == -float("inf"))
        p = tl.where(masked, 0.0, p)
        p = tl.where(others, rest(total, tl.sum(others.to(tl.float32), 1))[:, None], p)
        top = tl.max(student, 1)
        log_q = (student - top[:, None]) * rate
        q = tl.exp2(log_q)
        q_sum = tl.sum(q, 1)
        log_q = log_q * LN2 - tl.log(q_sum)[:, None]
        kl = tl.sum(tl.where(p <= 0, 0.0, p * (tl.log(p) - log_q)), 1)
        mass = tl.sum(p, 1)
    loss = kl_scale * kl

    if labels_at is not None:
        label = tl.load(labels_at + rows, mask=present, other=0)
        valid = valid & (label >= 0) & (label < classes)
        is_label = cols == label.to(tl.int32)[:, None]
        logits = student - top[:, None]
        hard = tl.exp(logits)
        hard_sum = tl.sum(hard, 1)
        open_classes = tl.sum((~masked).to(tl.float32), 1)
        own = tl.sum(tl.where(is_label, logits, 0.0), 1)
        flat = tl.sum(tl.where(masked, 0.0, logits), 1)
        loss += hard_scale * cross_entropy(own, flat, hard_sum, open_classes, smoothing)

    factor = tl.where(valid, row_weight(weight_at, rows, present), float("nan"))
    tl.store(losses_at + rows, factor * loss, mask=present)
    if gradient_at is not None:
        factor *= scale
        if upstream_at is not None:
            factor *= tl.load(upstream_at)
        gradient = kl_slope * (q * (mass / q_sum)[:, None] - p)
        if labels_at is not None:
            targets = smoothed(is_label, masked, open_classes, smoothing)
            gradient += hard_scale * (hard * (1 / hard_sum)[:, None] - targets)
        gradient_rows = gradient_at + (rows * (classes // ALIGN * ALIGN))[:, None]
        tl.store(gradient_rows + cols, (factor[:, None] * gradient).to(gradient_at.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=list(INTEGERS))
def kd_wide_rows(
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
    """Loss and gradient of one row (ROWS is 1), read twice in chunks."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    present = rows < samples
    classes = classes // ALIGN * ALIGN
    student_rows = student_at + (rows * (student_stride // ALIGN * ALIGN))[:, None]
    teacher_rows = teacher_at + (rows * (teacher_stride // ALIGN * ALIGN))[:, None]
    valid = present

    nothing = tl.zeros([ROWS], tl.float32)
    top, teacher_top = nothing - float("inf"), nothing - float("inf")
    q_sum, p_sum, cross, hard_sum, open_classes, flat = nothing, nothing, nothing, nothing, nothing, nothing
    mass, others_count, others_flat = nothing, nothing, nothing
    for start in range(0, classes, BLOCK):
        cols = (start + tl.arange(0, BLOCK))[None, :]
        student = tl.load(student_rows + cols, mask=cols < classes, other=-float("inf")).to(tl.float32)
        if indices_at is None:
            teacher = tl.load(teacher_rows + cols, mask=cols < classes, other=-float("inf")).to(tl.float32)
            q_sum, top, p_sum, teacher_top, cross, moved = compare_chunk(
                student, teacher, rate, q_sum, top, p_sum, teacher_top, cross
            )
            masked = (student == -float("inf")) & (teacher == -float("inf"))
            logits = student - finite(top)[:, None]
        else:
            p = kept_tile(teacher_at, indices_at, cols, rows, present, kept, ROWS, BLOCK)
            top, moved = raised(top, student)
            logits = student - finite(top)[:, None]
            q_sum = q_sum * tl.exp2(moved * rate) + tl.sum(tl.exp2(logits * rate), 1)
            others = (p == UNNAMED) & (student != -float("inf"))
            masked = (p == UNNAMED) & (student == -float("inf"))
            p = tl.where(p == UNNAMED, 0.0, p)
            cross -= mass * moved * rate * LN2
            cross += tl.sum(tl.where(p <= 0, 0.0, p * (tl.log(p) - logits * rate * LN2)), 1)
            mass += tl.sum(p, 1)
            others_flat += others_count * moved + tl.sum(tl.where(others, logits, 0.0), 1)
            others_count += tl.sum(others.to(tl.float32), 1)
        if labels_at is not None:
            hard_sum = hard_sum * tl.exp(moved) + tl.sum(tl.exp(logits), 1)
            flat += open_classes * moved + tl.sum(tl.where(masked, 0.0, logits), 1)
            open_classes += tl.sum((~masked).to(tl.float32), 1)

    if indices_at is None:
        loss = kl_scale * divergence(cross, q_sum, p_sum)
    else:
        total, valid = kept_mass(teacher_at, indices_at, rows, present, kept, classes)
        even_p = rest(total, others_count)
        spread = even_p * (others_count * tl.log(even_p) - others_flat * rate * LN2)
        mass += others_count * even_p
        loss = kl_scale * (cross + tl.where(even_p <= 0, 0.0, spread) + mass * tl.log(q_sum))
    if labels_at is not None:
        label = tl.load(labels_at + rows, mask=present, other=0)
        valid = valid & (label >= 0) & (label < classes)
        own = tl.load(student_at + rows * student_stride + label, mask=valid, other=0.0).to(tl.float32) - top
        loss += hard_scale * cross_entropy(own, flat, hard_sum, open_classes, smoothing)

    factor = tl.where(valid, row_weight(weight_at, rows, present), float("nan"))
    tl.store(losses_at + rows, factor * loss, mask=present)
    if gradient_at is not None:
        factor *= scale
        if upstream_at is not None:
            factor *= tl.load(upstream_at)
        gradient_rows = gradient_at + (rows * classes)[:, None]
        for start in range(0, classes, BLOCK):
            cols = (start + tl.arange(0, BLOCK))[None, :]
            student = tl.load(student_rows + cols, mask=cols < classes, other=-float("inf")).to(tl.float32)
            logits = student - top[:, None]
            if indices_at is None:
                teacher = tl.load(teacher_rows + cols, mask=cols < classes, other=-float("inf")).to(tl.float32)
                masked = (student == -float("inf")) & (teacher == -float("inf"))
                p = tl.exp2((teacher - teacher_top[:, None]) * rate) * (1 / p_sum)[:, None]
                gradient = kl_slope * (tl.exp2(logits * rate) * (1 / q_sum)[:, None] - p)
            else:
                p = kept_tile(teacher_at, indices_at, cols, rows, present, kept, ROWS, BLOCK)
                masked = (p == UNNAMED) & (student == -float("inf"))
                p = tl.where(masked, 0.0, tl.where(p == UNNAMED, even_p[:, None], p))
                gradient = kl_slope * (tl.exp2(logits * rate) * (mass / q_sum)[:, None] - p)
            if labels_at is not None:
                targets = smoothed(cols == label[:, None], masked, open_classes, smoothing)
                gradient += hard_scale * (tl.exp(logits) * (1 / hard_sum)[:, None] - targets)
            gradient = (factor[:, None] * gradient).to(gradient_at.dtype.element_ty)
            tl.store(gradient_rows + cols, gradient, mask=cols < classes)


@triton.jit
def row_weight(weight_at, rows, present):
    """The weight of each row `[ROWS]`."""
    if weight_at is None:
        return tl.where(present, 1.0, 0.0)
    else:
        return tl.load(weight_at + rows, mask=present, other=0.0)


@triton.jit
def kept_mass(teacher_at, indices_at, rows, present, kept, classes):
    """Sum of a top-k teacher's probabilities, and whether its indices all name a class; `[ROWS]` both."""
    total = tl.where(present, 0.0, 0.0)
    valid = present
    for place in range(kept):
        total += tl.load(teacher_at + rows * kept + place, mask=present, other=0.0).to(tl.float32)
        index = tl.load(indices_at + rows * kept + place, mask=present, other=0)
        valid = valid & (index >= 0) & (index < classes)
    return total, valid


@triton.jit
def kept_tile(teacher_at, indices_at, cols, rows, present, kept, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """A top-k teacher's probabilities `[ROWS, BLOCK]`, UNNAMED where it gave none."""
    p = tl.full([ROWS, BLOCK], UNNAMED, tl.float32)
    for place in range(kept):
        probability = tl.load(teacher_at + rows * kept + place, mask=present, other=0.0).to(tl.float32)
        index = tl.load(indices_at + rows * kept + place, mask=present, other=0)
        p = tl.where(cols == index.to(cols.dtype)[:, None], probability[:, None], p)
    return p


@triton.jit
def rest(total, others_count):
    """Share the mass that the kept classes lack evenly among those neither named nor masked; `[ROWS]`."""
    return tl.maximum(1 - total, 0.0) / tl.maximum(others_count, 1.0)


@triton.jit
def cross_entropy(own, flat, hard_sum, open_classes, smoothing):
    """`[ROWS]`, from the label's logit, the sum over the open classes' and that of exponentials, less the maximum."""
    log_sum = tl.log(hard_sum)
    uniform = tl.where(smoothing > 0, log_sum - flat / open_classes, 0.0)
    return (1 - smoothing) * (log_sum - own) + smoothing * uniform


@triton.jit
def smoothed(is_label, masked, open_classes, smoothing):
    """The labels' target distribution `[ROWS, BLOCK]`."""
    even = tl.where(masked, 0.0, (smoothing / open_classes)[:, None])
    return tl.where(is_label, even + (1 - smoothing), even)
