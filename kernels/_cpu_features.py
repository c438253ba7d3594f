"""Operands of the feature losses as the C++ core takes them."""

from __future__ import annotations

from stablekd_fast.kernels._cpu import TYPES, address
from stablekd_fast.kernels._features import DenseOperands, scale_stride


def for_core(found: DenseOperands) -> tuple:
    return (
        found.student.data_ptr(),
        TYPES[found.student.dtype],
        found.target.data_ptr(),
        TYPES[found.target.dtype],
        address(found.scales),
        scale_stride(found.scales, found.layout),
        address(found.gradient),
        found.layout,
    )
