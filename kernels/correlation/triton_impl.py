"""`correlation` by Triton: three kernels, over rows, over columns, and over rows again for the gradient.

Probabilities are not kept: each kernel makes them anew from logits, of which it reads a few bytes, and from what the
first one found of the rows. Rows pass twice through the first and the last kernel, in chunks where they are wide;
columns pass once, and what chunks of them came to is put together in order. 24 bytes of each row and 16 of each column
are written and read again, and 4 of loss.
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
    ALIGNMENTS,
    BLOCKS,
    Tiling,
    alignment,
    as_rows,
    finite,
    raised,
    rounded_rate,
    tiling,
)
from stablekd_fast.kernels.correlation import reference
from stablekd_fast.kernels.correlation.reference import Operands

WIDEST = 512
"""Classes of a row that are read at once: few, as several rows then share what is known of the columns."""

COLUMNS = Tiling(64, 16, 8)
"""The tile of the kernel over columns: 16 of them, so that few classes still make several programs."""

EPSILON = tl.constexpr(reference.VARIANCE_EPSILON)

_SIZES = ("samples", "classes", "student_stride", "teacher_stride")


@triton.jit(do_not_specialize=list(_SIZES))
def correlation_rows(
    student_at,  # [N, C], rows student_stride apart
    teacher_at,  # [N, C], rows teacher_stride apart
    rows_at,  # float32 [6, N], what is found of the rows: see `known_rows`
    losses_at,  # float32 [N + C], the rows' first
    samples: tl.int64,
    classes: tl.int64,
    student_stride: tl.int64,
    teacher_stride: tl.int64,
    rate,
    scale,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Sums of exponentials of ROWS rows, and the correlation of student and teacher along them."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    present = rows < samples
    # Dividing and multiplying tells the compiler of the multiples that vector loads and stores need.
    classes = classes // ALIGN * ALIGN
    student_rows = student_at + (rows * (student_stride // ALIGN * ALIGN))[:, None]
    teacher_rows = teacher_at + (rows * (teacher_stride // ALIGN * ALIGN))[:, None]

    nothing = tl.zeros([ROWS], tl.float32)
    student_top, teacher_top = nothing - float("inf"), nothing - float("inf")
    q_sum, p_sum = nothing, nothing
    for start in range(0, classes, BLOCK):
        cols = (start + tl.arange(0, BLOCK))[None, :]
        inside = present[:, None] & (cols < classes)
        student = tl.load(student_rows + cols, mask=inside, other=-float("inf")).to(tl.float32)
        teacher = tl.load(teacher_rows + cols, mask=inside, other=-float("inf")).to(tl.float32)
        student_top, student_moved = raised(student_top, student)
        teacher_top, teacher_moved = raised(teacher_top, teacher)
        q = tl.exp2((student - finite(student_top)[:, None]) * rate)
        p = tl.exp2((teacher - finite(teacher_top)[:, None]) * rate)
        q_sum = q_sum * tl.exp2(student_moved * rate) + tl.sum(q, 1)
        p_sum = p_sum * tl.exp2(teacher_moved * rate) + tl.sum(p, 1)

    q_share, p_share = 1 / q_sum, 1 / p_sum
    even = 1 / classes.to(tl.float32)
    q_square, p_square, both = nothing, nothing, nothing
    for start in range(0, classes, BLOCK):
        cols = (start + tl.arange(0, BLOCK))[None, :]
        inside = present[:, None] & (cols < classes)
        student = tl.load(student_rows + cols, mask=inside, other=-float("inf")).to(tl.float32)
        teacher = tl.load(teacher_rows + cols, mask=inside, other=-float("inf")).to(tl.float32)
        q = tl.where(inside, probabilities(student, student_top, q_share, rate) - even, 0.0)
        p = tl.where(inside, probabilities(teacher, teacher_top, p_share, rate) - even, 0.0)
        q_square += tl.sum(q * q, 1)
        p_square += tl.sum(p * p, 1)
        both += tl.sum(q * p, 1)

    loss, of_p, of_q = distance(q_square, p_square, both, scale)
    tl.store(losses_at + rows, loss, mask=present)
    out = rows_at + rows
    tl.store(out, student_top, mask=present)
    tl.store(out + samples, q_share, mask=present)
    tl.store(out + 2 * samples, teacher_top, mask=present)
    tl.store(out + 3 * samples, p_share, mask=present)
    tl.store(out + 4 * samples, of_q, mask=present)
    tl.store(out + 5 * samples, of_p, mask=present)


@triton.jit(do_not_specialize=list(_SIZES))
def correlation_columns(
    student_at,  # [N, C], rows student_stride apart
    teacher_at,  # [N, C], rows teacher_stride apart
    rows_at,  # float32 [6, N]
    columns_at,  # float32 [4, C]: means of student and teacher, and the factors of both in the derivative
    losses_at,  # float32 [N + C], the rows' first
    samples: tl.int64,
    classes: tl.int64,
    student_stride: tl.int64,
    teacher_stride: tl.int64,
    rate,
    scale,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The correlation of student and teacher along BLOCK columns, which are read ROWS rows at a time."""
    cols = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    known = cols < classes

    # All is relative to the first row, so that columns that do not vary come to 0 exactly.
    first = tl.zeros([1], tl.int64)
    q_first, p_first = of_columns(
        student_at, teacher_at, rows_at, first, cols, known[None, :], samples, student_stride, teacher_stride, rate
    )

    nothing = tl.zeros([BLOCK], tl.float32)
    q_mean, p_mean, q_square, p_square, both, before = nothing, nothing, nothing, nothing, nothing, nothing
    for start in range(0, samples, ROWS):
        rows = start + tl.arange(0, ROWS)
        present = rows < samples
        inside = present[:, None] & known[None, :]
        q, p = of_columns(
            student_at, teacher_at, rows_at, rows, cols, inside, samples, student_stride, teacher_stride, rate
        )
        q, p = tl.where(inside, q - q_first, 0.0), tl.where(inside, p - p_first, 0.0)
        # Means and squares of these rows, then those of all so far (Chan, Golub, LeVeque): nothing cancels.
        count = tl.sum(present.to(tl.float32), 0)
        part = count / (before + count)
        q_here, p_here = tl.sum(q, 0) / count, tl.sum(p, 0) / count
        q = tl.where(inside, q - q_here[None, :], 0.0)
        p = tl.where(inside, p - p_here[None, :], 0.0)
        q_ahead, p_ahead = q_here - q_mean, p_here - p_mean
        q_square += tl.sum(q * q, 0) + q_ahead * q_ahead * before * part
        p_square += tl.sum(p * p, 0) + p_ahead * p_ahead * before * part
        both += tl.sum(q * p, 0) + q_ahead * p_ahead * before * part
        q_mean += q_ahead * part
        p_mean += p_ahead * part
        before += count

    loss, of_p, of_q = distance(q_square, p_square, both, scale)
    tl.store(losses_at + samples + cols, loss, mask=known)
    out = columns_at + cols
    tl.store(out, q_mean + tl.sum(q_first, 0), mask=known)
    tl.store(out + classes, p_mean + tl.sum(p_first, 0), mask=known)
    tl.store(out + 2 * classes, of_q, mask=known)
    tl.store(out + 3 * classes, of_p, mask=known)


@triton.jit(do_not_specialize=list(_SIZES))
def correlation_gradient(
    student_at,  # [N, C], rows student_stride apart
    teacher_at,  # [N, C], rows teacher_stride apart
    rows_at,  # float32 [6, N]
    columns_at,  # float32 [4, C]
    upstream_at,  # float32 [] or None
    gradient_at,  # [N, C] in the student's dtype
    samples: tl.int64,
    classes: tl.int64,
    student_stride: tl.int64,
    teacher_stride: tl.int64,
    rate,
    slope,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Gradients of ROWS rows: derivatives with respect to the probabilities, and through the softmax."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    present = rows < samples
    classes = classes // ALIGN * ALIGN
    student_rows = student_at + (rows * (student_stride // ALIGN * ALIGN))[:, None]
    teacher_rows = teacher_at + (rows * (teacher_stride // ALIGN * ALIGN))[:, None]
    gradient_rows = gradient_at + (rows * classes)[:, None]
    student_top, q_share, teacher_top, p_share = known_rows(rows_at, rows, samples)
    of_q = tl.load(rows_at + 4 * samples + rows, mask=present, other=0.0)
    of_p = tl.load(rows_at + 5 * samples + rows, mask=present, other=0.0)
    factor = slope + tl.zeros([ROWS], tl.float32)
    if upstream_at is not None:
        factor *= tl.load(upstream_at)

    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, classes, BLOCK):
        cols = (start + tl.arange(0, BLOCK))[None, :]
        inside = present[:, None] & (cols < classes)
        student = tl.load(student_rows + cols, mask=inside, other=-float("inf")).to(tl.float32)
        teacher = tl.load(teacher_rows + cols, mask=inside, other=-float("inf")).to(tl.float32)
        q = probabilities(student, student_top, q_share, rate)
        p = probabilities(teacher, teacher_top, p_share, rate)
        total += tl.sum(q * derivative(q, p, of_q, of_p, columns_at, cols, classes), 1)
    for start in range(0, classes, BLOCK):
        cols = (start + tl.arange(0, BLOCK))[None, :]
        inside = present[:, None] & (cols < classes)
        student = tl.load(student_rows + cols, mask=inside, other=-float("inf")).to(tl.float32)
        teacher = tl.load(teacher_rows + cols, mask=inside, other=-float("inf")).to(tl.float32)
        q = probabilities(student, student_top, q_share, rate)
        p = probabilities(teacher, teacher_top, p_share, rate)
        ahead = derivative(q, p, of_q, of_p, columns_at, cols, classes) - total[:, None]
        gradient = factor[:, None] * (q * ahead)
        tl.store(gradient_rows + cols, gradient.to(gradient_at.dtype.element_ty), mask=inside)


@triton.jit
def of_columns(student_at, teacher_at, rows_at, rows, cols, inside, samples, student_stride, teacher_stride, rate):
    """Probabilities of student and teacher in these rows and columns, a tile of each; 0 where not `inside`."""
    student_place = (rows * student_stride)[:, None] + cols[None, :]
    teacher_place = (rows * teacher_stride)[:, None] + cols[None, :]
    student = tl.load(student_at + student_place, mask=inside, other=-float("inf")).to(tl.float32)
    teacher = tl.load(teacher_at + teacher_place, mask=inside, other=-float("inf")).to(tl.float32)
    student_top, q_share, teacher_top, p_share = known_rows(rows_at, rows, samples)
    return probabilities(student, student_top, q_share, rate), probabilities(teacher, teacher_top, p_share, rate)


@triton.jit
def probabilities(logits, top, share, rate):
    """Return those of a `[ROWS, BLOCK]` tile, from its rows' maxima and 1 over their sums of exponentials, `[ROWS]`."""
    return tl.exp2((logits - top[:, None]) * rate) * share[:, None]


@triton.jit
def known_rows(rows_at, rows, samples):
    """What makes probabilities of the rows' logits, `[ROWS]` each: the student's maximum and one over the sum of its
    exponentials, and the teacher's. The factors of both in the derivative follow behind."""
    present = rows < samples
    student_top = tl.load(rows_at + rows, mask=present, other=0.0)
    q_share = tl.load(rows_at + samples + rows, mask=present, other=0.0)
    teacher_top = tl.load(rows_at + 2 * samples + rows, mask=present, other=0.0)
    p_share = tl.load(rows_at + 3 * samples + rows, mask=present, other=0.0)
    return student_top, q_share, teacher_top, p_share


@triton.jit
def distance(q_square, p_square, both, scale):
    """`scale` * (1 - correlation), and minus the factors of p and of q in its derivative with respect to q: of sums of
    squares and of products, of values less their means."""
    q_length, p_length = tl.sqrt(q_square + EPSILON), tl.sqrt(p_square + EPSILON)
    correlation = both / (q_length * p_length)
    of_p = scale / (q_length * p_length)
    return scale * (1 - correlation), of_p, scale * correlation / (q_square + EPSILON)


@triton.jit
def derivative(q, p, of_q, of_p, columns_at, cols, classes):
    """Return that of the distances with respect to a `[ROWS, BLOCK]` tile of the student's probabilities."""
    known = cols < classes
    even = 1 / classes.to(tl.float32)
    q_mean = tl.load(columns_at + cols, mask=known, other=0.0)
    p_mean = tl.load(columns_at + classes + cols, mask=known, other=0.0)
    column_of_q = tl.load(columns_at + 2 * classes + cols, mask=known, other=0.0)
    column_of_p = tl.load(columns_at + 3 * classes + cols, mask=known, other=0.0)
    along_rows = (q - even) * of_q[:, None] - (p - even) * of_p[:, None]
    return along_rows + (q - q_mean) * column_of_q - (p - p_mean) * column_of_p


def correlation(given: Operands) -> Tensor:
    if not in_single_precision(given.student, given.teacher):
        return reference.correlation(given)
    return _run(given, 1.0, None, None)


def correlation_with_grad(given: Operands, factor: float, upstream: Tensor | None) -> tuple[Tensor, Tensor]:
    if not in_single_precision(given.student, given.teacher):
        return reference.correlation_with_grad(given, factor, upstream)
    gradient = row_by_row(given.student)
    loss = _run(given, factor, upstream, gradient)
    return loss, laid_out_like(gradient, given.student)


def specialisations() -> Iterator[Listed]:
    yield from _triton_finish.specialisations()
    float32, sizes, numbers = torch.float32, [0] * len(_SIZES), [0.0, 0.0]
    for student, teacher in product(FLOATS, FLOATS):
        given = {"student_at": student, "teacher_at": teacher, "rows_at": float32}
        arguments = _arguments(given | {"columns_at": float32, "losses_at": float32}, sizes, ("rate", "scale"), numbers)
        yield Listed(correlation_columns, variant(correlation_columns, arguments, COLUMNS.constants, COLUMNS.warps))
        for block, align in product((block for block in BLOCKS if block <= WIDEST), ALIGNMENTS):
            tile = _tile(block, align)
            wide = align * min(student.itemsize, teacher.itemsize) >= 16
            constants = {**tile.constants, "ALIGN": align}
            arguments = _arguments(given | {"losses_at": float32}, sizes, ("rate", "scale"), numbers)
            yield Listed(correlation_rows, variant(correlation_rows, arguments, constants, tile.warps), wide_loads=wide)
            for upstream in (None, float32):
                found = {"columns_at": float32, "upstream_at": upstream, "gradient_at": student}
                arguments = _arguments(given | found, sizes, ("rate", "slope"), numbers)
                yield Listed(
                    correlation_gradient,
                    variant(correlation_gradient, arguments, constants, tile.warps),
                    wide_loads=wide,
                    wide_stores=wide,
                )


def _run(given: Operands, factor: float, upstream: Tensor | None, gradient: Tensor | None) -> Tensor:
    samples, classes = given.student.shape
    student, teacher, upstream = as_rows(given.student), as_rows(given.teacher), packed(upstream, torch.float32)
    rows, columns, losses = (
        torch.empty(shape, dtype=torch.float32, device=student.device)
        for shape in ((6, samples), (4, classes), (samples + classes,))
    )
    rate, temperature = rounded_rate(given.temperature)
    sizes = (samples, classes, student.stride(0), teacher.stride(0))
    align = alignment(*sizes[1:])
    tile = _tile(classes, align)
    logits = {"student_at": student, "teacher_at": teacher, "rows_at": rows}

    over_rows, over_columns = (triton.cdiv(samples, tile.rows),), (triton.cdiv(classes, COLUMNS.block),)
    constants = {**tile.constants, "ALIGN": align}
    # Correlations hardly depend on the temperature, so its square is that of the very number that was given.
    inter, intra = (given.temperature**2 * weight for weight in (given.inter, given.intra))
    arguments = _arguments(logits | {"losses_at": losses}, sizes, ("rate", "scale"), (rate, inter / samples))
    launch(correlation_rows, over_rows, arguments, constants, tile.warps)
    found = logits | {"columns_at": columns, "losses_at": losses}
    arguments = _arguments(found, sizes, ("rate", "scale"), (rate, intra / classes))
    launch(correlation_columns, over_columns, arguments, COLUMNS.constants, COLUMNS.warps)
    if gradient is not None:
        found = logits | {"columns_at": columns, "upstream_at": upstream, "gradient_at": gradient}
        arguments = _arguments(found, sizes, ("rate", "slope"), (rate, factor / temperature))
        launch(correlation_gradient, over_rows, arguments, constants, tile.warps)
    return _triton_finish.total(losses, factor, upstream)


def _tile(classes: int, align: int) -> Tiling:
    return tiling(min(classes, WIDEST), align)


def _arguments(tensors: dict, sizes, names: tuple[str, str], numbers) -> dict:
    return tensors | dict(zip(_SIZES, map(int, sizes))) | dict(zip(names, map(float, numbers)))
