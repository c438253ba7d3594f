"""`feature_cosine` by the C++ core."""

from __future__ import annotations

import torch
from stablekd_fast.kernels._checks import laid_out_like
from stablekd_fast.kernels._cpu import GRAIN, number, threads
from stablekd_fast.kernels._cpu_features import for_core
from stablekd_fast.kernels._features import Operands, operands
from stablekd_fast.kernels._native import core
from stablekd_fast.kernels.feature_cosine import reference
from torch import Tensor


def feature_cosine(student: Tensor, target: Tensor, target_scale: Tensor | None, per: str, channel_axis: int) -> Tensor:
    found = operands(student, target, target_scale, channel_axis, with_gradient=False)
    if found is None:
        return reference.feature_cosine(student, target, target_scale, per, channel_axis)
    return _call(found, per, 1.0)


def feature_cosine_with_grad(
    student: Tensor,
    target: Tensor,
    target_scale: Tensor | None,
    per: str,
    channel_axis: int,
    factor: float,
    upstream: Tensor | None,
) -> tuple[Tensor, Tensor]:
    found = operands(student, target, target_scale, channel_axis, with_gradient=True)
    if found is None:
        return reference.feature_cosine_with_grad(student, target, target_scale, per, channel_axis, factor, upstream)
    loss = _call(found, per, factor * number(upstream))
    return loss, laid_out_like(found.gradient, student)


def _call(found: Operands, per: str, factor: float) -> Tensor:
    loss = core.feature_cosine(*for_core(found), per == "position", factor, threads(found.layout.numel, GRAIN))
    return torch.tensor(factor * loss, dtype=torch.float32)
