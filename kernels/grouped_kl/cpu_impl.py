"""`grouped_kl` by the C++ core."""

from __future__ import annotations

import torch
from torch import Tensor

from stablekd_fast.kernels._checks import laid_out_like
from stablekd_fast.kernels._cpu import EXPONENTIAL_GRAIN, TYPES, address, number, threads
from stablekd_fast.kernels._logits import as_rows, in_single_precision, row_by_row
from stablekd_fast.kernels._native import core
from stablekd_fast.kernels.grouped_kl import reference
from stablekd_fast.kernels.grouped_kl.reference import Operands


def grouped_kl(given: Operands) -> Tensor:
    if not in_single_precision(given.student, given.teacher):
        return reference.grouped_kl(given)
    return _call(given, 1.0, None)


def grouped_kl_with_grad(given: Operands, factor: float, upstream: Tensor | None) -> tuple[Tensor, Tensor]:
    if not in_single_precision(given.student, given.teacher):
        return reference.grouped_kl_with_grad(given, factor, upstream)
    gradient = row_by_row(given.student)
    loss = _call(given, factor * number(upstream), gradient)
    return loss, laid_out_like(gradient, given.student)


def _call(given: Operands, factor: float, gradient: Tensor | None) -> Tensor:
    student, teacher = as_rows(given.student), as_rows(given.teacher)
    samples, classes = student.shape
    loss = core.grouped_kl(
        (student.data_ptr(), TYPES[student.dtype], student.stride(0)),
        (teacher.data_ptr(), TYPES[teacher.dtype], teacher.stride(0)),
        address(gradient),
        samples,
        classes,
        given.temperature,
        given.threshold,
        given.primary_weight,
        given.binary_weight,
        factor,
        threads(student.numel(), EXPONENTIAL_GRAIN),
    )
    return torch.tensor(factor * loss, dtype=torch.float32)
