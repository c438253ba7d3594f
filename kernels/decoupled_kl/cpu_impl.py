"""`decoupled_kl` by the C++ core."""

from __future__ import annotations

import torch
from torch import Tensor

from stablekd_fast.kernels._checks import laid_out_like
from stablekd_fast.kernels._cpu import EXPONENTIAL_GRAIN, TYPES, address, number, threads
from stablekd_fast.kernels._logits import as_rows, in_single_precision, refuse_row, row_by_row
from stablekd_fast.kernels._native import core
from stablekd_fast.kernels.decoupled_kl import reference
from stablekd_fast.kernels.decoupled_kl.reference import Operands


def decoupled_kl(given: Operands) -> Tensor:
    if not in_single_precision(given.student, given.teacher):
        return reference.decoupled_kl(given)
    return _call(given, 1.0, None)


def decoupled_kl_with_grad(given: Operands, factor: float, upstream: Tensor | None) -> tuple[Tensor, Tensor]:
    if not in_single_precision(given.student, given.teacher):
        return reference.decoupled_kl_with_grad(given, factor, upstream)
    gradient = row_by_row(given.student)
    loss = _call(given, factor * number(upstream), gradient)
    return loss, laid_out_like(gradient, given.student)


def _call(given: Operands, factor: float, gradient: Tensor | None) -> Tensor:
    student, teacher, labels = as_rows(given.student), as_rows(given.teacher), given.labels.contiguous()
    samples, classes = student.shape
    loss, bad_row = core.decoupled_kl(
        (student.data_ptr(), TYPES[student.dtype], student.stride(0)),
        (teacher.data_ptr(), TYPES[teacher.dtype], teacher.stride(0)),
        labels.data_ptr(),
        address(gradient),
        samples,
        classes,
        given.temperature,
        given.alpha,
        given.beta,
        factor,
        threads(student.numel(), EXPONENTIAL_GRAIN),
    )
    if bad_row >= 0:
        refuse_row(bad_row, classes, labels)
    return torch.tensor(factor * loss, dtype=torch.float32)
