"""Operands of the feature losses as the C++ core takes them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stablekd_fast.kernels._checks import FLOATS
from stablekd_fast.kernels._cpu import TYPES, address, scale_stride
from stablekd_fast.kernels._layout import Layout, dense, laid_out_as, layout


class Operands(NamedTuple):
    """Student and target in one dense layout, and the gradient (or None) to be written in that layout."""

    student: Tensor
    target: Tensor
    scales: Tensor | None
    gradient: Tensor | None
    layout: Layout

    def for_core(self) -> tuple:
        return (
            self.student.data_ptr(),
            TYPES[self.student.dtype],
            self.target.data_ptr(),
            TYPES[self.target.dtype],
            address(self.scales),
            scale_stride(self.scales, self.layout),
            address(self.gradient),
            self.layout,
        )


def operands(
    student: Tensor, target: Tensor, target_scale: Tensor | None, channel_axis: int, with_gradient: bool
) -> Operands | None:
    """None where the reference must serve: double precision, and tensors without elements."""
    if student.dtype not in FLOATS or target.dtype not in TYPES or student.numel() == 0:
        return None
    student = dense(student)
    target = laid_out_as(target, student)
    scales = None if target_scale is None else target_scale.contiguous()
    gradient = torch.empty_like(student) if with_gradient else None
    return Operands(student, target, scales, gradient, layout(student, channel_axis))
