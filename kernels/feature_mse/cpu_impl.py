"""`feature_mse` by the C++ core."""

from __future__ import annotations

import torch
from torch import Tensor

from stablekd_fast.kernels._checks import laid_out_like
from stablekd_fast.kernels._cpu import GRAIN, number, threads
from stablekd_fast.kernels._cpu_features import for_core
from stablekd_fast.kernels._features import DenseOperands, dense_operands
from stablekd_fast.kernels._native import core
from stablekd_fast.kernels.feature_mse import reference
from stablekd_fast.kernels.feature_mse.reference import Operands

_NORMALIZE = {None: 0, "power": 1, "channel": 2, "l2": 3}
"""The numbers of `Normalize` in csrc/kernels.h."""


def feature_mse(given: Operands) -> Tensor:
    found = dense_operands(given, with_gradient=False)
    if found is None:
        return reference.feature_mse(given)
    return _call(found, given.normalize, given.power, 1.0)


def feature_mse_with_grad(given: Operands, factor: float, upstream: Tensor | None) -> tuple[Tensor, Tensor]:
    found = dense_operands(given, with_gradient=True)
    if found is None:
        return reference.feature_mse_with_grad(given, factor, upstream)
    loss = _call(found, given.normalize, given.power, factor * number(upstream))
    assert found.gradient is not None
    return loss, laid_out_like(found.gradient, given.student)


def _call(found: DenseOperands, normalize: str | None, power: Tensor | None, factor: float) -> Tensor:
    loss = core.feature_mse(
        *for_core(found),
        _NORMALIZE[normalize],
        None if power is None else float(power),
        factor,
        threads(found.layout.numel, GRAIN),
    )
    return torch.tensor(factor * loss, dtype=torch.float32)
