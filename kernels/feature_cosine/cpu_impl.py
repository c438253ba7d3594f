"""`feature_cosine` by the C++ core."""

from __future__ import annotations

import torch
from torch import Tensor

from stablekd_fast.kernels._checks import laid_out_like
from stablekd_fast.kernels._cpu import GRAIN, number, threads
from stablekd_fast.kernels._cpu_features import for_core
from stablekd_fast.kernels._features import DenseOperands, dense_operands
from stablekd_fast.kernels._native import core
from stablekd_fast.kernels.feature_cosine import reference
from stablekd_fast.kernels.feature_cosine.reference import Operands


def feature_cosine(given: Operands) -> Tensor:
    found = dense_operands(given, with_gradient=False)
    if found is None:
        return reference.feature_cosine(given)
    return _call(found, given.per, 1.0)


def feature_cosine_with_grad(given: Operands, factor: float, upstream: Tensor | None) -> tuple[Tensor, Tensor]:
    found = dense_operands(given, with_gradient=True)
    if found is None:
        return reference.feature_cosine_with_grad(given, factor, upstream)
    loss = _call(found, given.per, factor * number(upstream))
    assert found.gradient is not None
    return loss, laid_out_like(found.gradient, given.student)


def _call(found: DenseOperands, per: str, factor: float) -> Tensor:
    loss = core.feature_cosine(*for_core(found), per == "position", factor, threads(found.layout.numel, GRAIN))
    return torch.tensor(factor * loss, dtype=torch.float32)
