"""`kd_loss` by the C++ core."""

from __future__ import annotations

import torch
from torch import Tensor

from stablekd_fast.kernels._checks import laid_out_like
from stablekd_fast.kernels._cpu import EXPONENTIAL_GRAIN, TYPES, address, number, threads
from stablekd_fast.kernels._logits import as_rows, in_single_precision, refuse_row, row_by_row
from stablekd_fast.kernels._native import core
from stablekd_fast.kernels.kd_loss import reference
from stablekd_fast.kernels.kd_loss.reference import Operands


def kd_loss(given: Operands) -> Tensor:
    if not in_single_precision(given.student, given.teacher):
        return reference.kd_loss(given)
    return _call(given, 1.0, None)


def kd_loss_with_grad(given: Operands, factor: float, upstream: Tensor | None) -> tuple[Tensor, Tensor]:
    if not in_single_precision(given.student, given.teacher):
        return reference.kd_loss_with_grad(given, factor, upstream)
    gradient = row_by_row(given.student)
    loss = _call(given, factor * number(upstream), gradient)
    return loss, laid_out_like(gradient, given.student)


def _call(given: Operands, factor: float, gradient: Tensor | None) -> Tensor:
    student, teacher = as_rows(given.student), as_rows(given.teacher)
    indices = None if given.indices is None else given.indices.contiguous()
    labels = None if given.labels is None else given.labels.contiguous()
    weight = None if given.weight is None else given.weight.to(torch.float32).contiguous()
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
        given.temperature,
        given.alpha,
        given.label_smoothing,
        factor,
        threads(student.numel(), EXPONENTIAL_GRAIN),
    )
    if bad_row >= 0:
        refuse_row(bad_row, classes, labels, indices)
    return torch.tensor(factor * loss, dtype=torch.float32)
