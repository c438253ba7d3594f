"""`kd_loss` by the C++ core."""

from __future__ import annotations

import torch
from stablekd_fast.kernels._checks import laid_out_like
from stablekd_fast.kernels._cpu import EXPONENTIAL_GRAIN, TYPES, address, number, threads
from stablekd_fast.kernels._logits import as_rows, in_single_precision, refuse_row, row_by_row
from stablekd_fast.kernels._native import core
from stablekd_fast.kernels.kd_loss import reference
from torch import Tensor


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
    if not in_single_precision(student, teacher):
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
    if not in_single_precision(student, teacher):
        return reference.kd_loss_with_grad(
            student, teacher, indices, labels, temperature, alpha, label_smoothing, weight, factor, upstream
        )
    gradient = row_by_row(student)
    factor *= number(upstream)
    loss = _call(student, teacher, indices, labels, temperature, alpha, label_smoothing, weight, factor, gradient)
    return loss, laid_out_like(gradient, student)


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
        threads(student.numel(), EXPONENTIAL_GRAIN),
    )
    if bad_row >= 0:
        refuse_row(bad_row, classes, labels, indices)
    return torch.tensor(factor * loss, dtype=torch.float32)
