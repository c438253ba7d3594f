"""Helpers of the losses on logits: checks of operands, and the form in which fused implementations take them."""

from __future__ import annotations

import torch
from torch import Tensor

from stablekd_fast.kernels._checks import FLOATS, OperandError, describe


def check_student(student: Tensor, temperature: float) -> None:
    if not (student.dim() == 2 and student.is_floating_point()):
        raise OperandError(f"student_logits is {describe(student)}; it must be a floating point [N, C].")
    if not temperature > 0:
        raise OperandError(f"temperature={temperature} was given; it must be greater than 0.")


def check_teacher(teacher: Tensor, student: Tensor) -> None:
    if not (teacher.shape == student.shape and teacher.is_floating_point()):
        raise OperandError(
            f"teacher_logits is {describe(teacher)} but student_logits {describe(student)}; "
            "teacher and student must have the same batch and classes."
        )


def check_labels(labels: Tensor, student: Tensor) -> None:
    if not (labels.dtype == torch.int64 and labels.shape == student.shape[:1]):
        raise OperandError(f"labels is {describe(labels)}; it must be int64 [{student.shape[0]}].")


def in_single_precision(student: Tensor, teacher: Tensor) -> bool:
    """Say whether the fused implementations serve: not float64, nor empty batches, which have no mean."""
    return student.dtype in FLOATS and teacher.dtype in FLOATS and student.numel() > 0


def row_by_row(student: Tensor) -> Tensor:
    """Return room for a gradient, contiguous as the fused implementations write it.

    `laid_out_like` then gives it the format of the student.
    """
    return torch.empty_like(student, memory_format=torch.contiguous_format)


def as_rows(matrix: Tensor) -> Tensor:
    """Return `matrix` `[N, C]` itself where the elements of a row lie side by side, otherwise a contiguous copy."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def refuse_row(row: int, classes: int, labels: Tensor | None, indices: Tensor | None = None) -> None:
    """Raise OperandError for the label or teacher index of `row` that is no class."""
    if labels is not None and not 0 <= labels[row] < classes:
        raise OperandError(
            f"labels[{row}] is {int(labels[row])}; it must be in 0..{classes - 1}, as there are {classes} classes."
        )
    assert indices is not None
    raise OperandError(
        f"the teacher's indices[{row}] are {indices[row].tolist()}; they must be in 0..{classes - 1}, "
        f"as there are {classes} classes."
    )
