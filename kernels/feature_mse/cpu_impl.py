"""`feature_mse` by the C++ core."""

from __future__ import annotations

import torch
from stablekd_fast.kernels._checks import laid_out_like
from stablekd_fast.kernels._cpu import GRAIN, number, threads
from stablekd_fast.kernels._cpu_features import for_core
from stablekd_fast.kernels._features import Operands, operands
from stablekd_fast.kernels._native import core
from stablekd_fast.kernels.feature_mse import reference
from torch import Tensor

_NORMALIZE = {None: 0, "power": 1, "channel": 2, "l2": 3}
"""The numbers of `Normalize` in csrc/kernels.h."""


def feature_mse(
    student: Tensor,
    target: Tensor,
    target_scale: Tensor | None,
    normalize: str | None,
    power: Tensor | None,
    channel_axis: int,
) -> Tensor:
    found = operands(student, target, target_scale, channel_axis, with_gradient=False)
    if found is None:
        return reference.feature_mse(student, target, target_scale, normalize, power, channel_axis)
    return _call(found, normalize, power, 1.0)


def feature_mse_with_grad(
    student: Tensor,
    target: Tensor,
    target_scale: Tensor | None,
    normalize: str | None,
    power: Tensor | None,
    channel_axis: int,
    factor: float,
    upstream: Tensor | None,
) -> tuple[Tensor, Tensor]:
    found = operands(student, target, target_scale, channel_axis, with_gradient=True)
    if found is None:
        return reference.feature_mse_with_grad(
            student, target, target_scale, normalize, power, channel_axis, factor, upstream
        )
    loss = _call(found, normalize, power, factor * number(upstream))
    return loss, laid_out_like(found.gradient, student)


def _call(found: Operands, normalize: str | None, power: Tensor | None, factor: float) -> Tensor:
    loss = core.feature_mse(
        *for_core(found),
        _NORMALIZE[normalize],
        None if power is None else float(power),
        factor,
        threads(found.layout.numel, GRAIN),
    )
    return torch.tensor(factor * loss, dtype=torch.float32)
