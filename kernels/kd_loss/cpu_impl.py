"""`kd_loss` by the C++ core."""

from __future__ import annotations

import torch
from torch import Tensor

from stablekd_fast.kernels._cpu import FLOATS, TYPES, address, number, threads
from stablekd_fast.kernels._logits import as_rows, refuse_row
from stablekd_fast.kernels._native import core
from stablekd_fast.kernels.kd_loss import reference

# Elements per thread: exponentials are worth a thread sooner than plain arithmetic.
_GRAIN = 4096


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
    return _call(student, teacher, indices, labels, temperature, alpha, label_smoothing, weight, 1.0, None)


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
    gradient = torch.empty_like(student)
    into = gradient if gradient.is_contiguous() else torch.empty_like(student, memory_format=torch.contiguous_format)
    factor *= number(upstream)
    loss = _call(student, teacher, indices, labels, temperature, alpha, label_smoothing, weight, factor, into)
    return loss, gradient if into is gradient else gradient.copy_(into)


def _fits(student: Tensor, teacher: Tensor) -> bool:
    """The core computes in single precision; empty batches have no mean, as the reference says."""
    return student.dtype in FLOATS and teacher.dtype in FLOATS and student.numel() > 0


def _call(
    student: Tensor,
    teacher: Tensor,
    indices: Tensor | None,
    labels: Tensor | None,
    temperature: float,
    alpha: float,
    label_smoothing: float,
    weight: Tensor | None,
    factor: float,
    gradient: Tensor | None,
) -> Tensor:
    student, teacher = as_rows(student), as_rows(teacher)
    indices = None if indices is None else indices.contiguous()
    labels = None if labels is None else labels.contiguous()
    weight = None if weight is None else weight.to(torch.float32).contiguous()
    samples, classes = student.shape
    loss, bad_row = core.kd_loss(
        (student.data_ptr(), TYPES[student.dtype], student.stride(0)),
        (teacher.data_ptr(), TYPES[teacher.dtype], teacher.stride(0)),
        address(indices),
        0 if indices is None else indices.shape[1],
        address(labels),
        address(weight),
        address(gradient),
        samples,
        classes,
        temperature,
        alpha,
        label_smoothing,
        factor,
        threads(student.numel(), _GRAIN),
    )
    if bad_row >= 0:
        refuse_row(bad_row, classes, labels, indices)
    return torch.tensor(factor * loss, dtype=torch.float32)
