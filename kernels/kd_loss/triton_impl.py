"""`kd_loss` by Triton: reads each logit once and writes each gradient once.

Rows of more than 8192 classes (with a top-k teacher 4096) do not fit into registers and are read twice where a gradient
is wanted. Per row 4 bytes of loss are written and read again. A top-k teacher costs k sweeps over the row in registers
and no more bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
import triton
from torch import Tensor

from stablekd_fast.kernels import _triton_finish
from stablekd_fast.kernels._checks import FLOATS, laid_out_like
from stablekd_fast.kernels._launch import Listed, launch, packed, variant
from stablekd_fast.kernels._logits import in_single_precision, row_by_row
from stablekd_fast.kernels._logits_triton import (
    CHUNK,
    WIDE,
    Tiling,
    alignment,
    as_rows,
    rounded_rate,
    tiling,
    tilings,
)
from stablekd_fast.kernels.kd_loss import reference
from stablekd_fast.kernels.kd_loss._triton_kernels import INTEGERS, NUMBERS, kd_rows, kd_wide_rows
from stablekd_fast.kernels.kd_loss.reference import Operands


def kd_loss(given: Operands) -> Tensor:
    if not in_single_precision(given.student, given.teacher):
        return reference.kd_loss(given)
    return _run(given, 1.0, None, None)


def kd_loss_with_grad(given: Operands, factor: float, upstream: Tensor | None) -> tuple[Tensor, Tensor]:
    if not in_single_precision(given.student, given.teacher):
        return reference.kd_loss_with_grad(given, factor, upstream)
    gradient = row_by_row(given.student)
    loss = _run(given, factor, upstream, gradient)
    return loss, laid_out_like(gradient, given.student)


def specialisations() -> Iterator[Listed]:
    yield from _triton_finish.specialisations()
    flags = product((False, True), (False, True), ((False, None), (True, None), (True, torch.float32)))
    for has_labels, has_weight, (has_gradient, upstream) in flags:
        labels = torch.int64 if has_labels else None
        weight = torch.float32 if has_weight else None
        for student, teacher, (tile, align), top_k_teacher in product(FLOATS, FLOATS, tilings(), (False, True)):
            if top_k_teacher and tile.block > CHUNK:
                continue
            indices = torch.int64 if top_k_teacher else None
            gradient = student if has_gradient else None
            tensors = (student, teacher, indices, labels, weight, upstream, gradient, torch.float32)
            arguments = _arguments(tensors, [0] * len(INTEGERS), [0.0] * len(NUMBERS))
            kernel = _kernel(tile)
            wide = align * min(student.itemsize, student.itemsize if top_k_teacher else teacher.itemsize) >= 16
            yield Listed(
                kernel,
                variant(kernel, arguments, {**tile.constants, "ALIGN": align}, tile.warps),
                wide_loads=wide,
                wide_stores=wide and has_gradient,
            )


def _run(given: Operands, factor: float, upstream: Tensor | None, gradient: Tensor | None) -> Tensor:
    samples, classes = given.student.shape
    student = as_rows(given.student)
    teacher = as_rows(given.teacher) if given.indices is None else packed(given.teacher, given.teacher.dtype)
    indices, labels = packed(given.indices, torch.int64), packed(given.labels, torch.int64)
    weight, upstream = packed(given.weight, torch.float32), packed(upstream, torch.float32)
    losses = torch.empty(samples, dtype=torch.float32, device=student.device)
    alpha = 1.0 if labels is None else given.alpha
    kept = 0 if indices is None else indices.shape[1]
    strides = (student.stride(0), teacher.stride(0))
    rate, temperature = rounded_rate(given.temperature)
    arguments = _arguments(
        (student, teacher, indices, labels, weight, upstream, gradient, losses),
        (samples, classes, kept, *strides),
        (rate, alpha * temperature**2, alpha * temperature, 1 - alpha, given.label_smoothing, factor / samples),
    )
    align = alignment(classes, *(strides if indices is None else strides[:1]))
    tile = _tile(classes, align, indices is not None)
    grid = (triton.cdiv(samples, tile.rows),)
    launch(_kernel(tile), grid, arguments, {**tile.constants, "ALIGN": align}, tile.warps)
    return _triton_finish.total(losses, factor / samples, upstream)


def _tile(classes: int, align: int, top_k_teacher: bool) -> Tiling:
    """Choose the tiling. A top-k teacher's probabilities of more than 4096 classes do not fit into registers too."""
    return WIDE if top_k_teacher and classes > CHUNK else tiling(classes, align)


def _kernel(tile):
    return kd_wide_rows if tile is WIDE else kd_rows


def _arguments(tensors, integers, numbers) -> dict:
    names = ("student", "teacher", "indices", "labels", "weight", "upstream", "gradient", "losses")
    arguments = {f"{name}_at": tensor for name, tensor in zip(names, tensors)}
    return arguments | dict(zip(INTEGERS, map(int, integers))) | dict(zip(NUMBERS, map(float, numbers)))
