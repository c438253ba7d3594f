"""`attention_transfer` by the C++ core, for the power 2."""

from __future__ import annotations

import torch
from torch import Tensor

from stablekd_fast.kernels._checks import laid_out_like
from stablekd_fast.kernels._cpu import GRAIN, TYPES, address, number, threads
from stablekd_fast.kernels._native import core
from stablekd_fast.kernels.attention_transfer import reference
from stablekd_fast.kernels.attention_transfer._memory import PlainMaps, channels_last, plain_maps
from stablekd_fast.kernels.attention_transfer.reference import Operands


def attention_transfer(given: Operands) -> Tensor:
    found = plain_maps(given, with_gradient=False)
    if found is None:
        return reference.attention_transfer(given)
    return _call(found, 1.0)


def attention_transfer_with_grad(given: Operands, factor: float, upstream: Tensor | None) -> tuple[Tensor, Tensor]:
    found = plain_maps(given, with_gradient=True)
    if found is None:
        return reference.attention_transfer_with_grad(given, factor, upstream)
    loss = _call(found, factor * number(upstream))
    assert found.gradient is not None
    return loss, laid_out_like(found.gradient, given.student)


def _call(found: PlainMaps, factor: float) -> Tensor:
    student, target, gradient = found
    loss = core.attention_transfer(
        *((x.data_ptr(), TYPES[x.dtype], x.shape[1], channels_last(x)) for x in (student, target)),
        address(gradient),
        found.samples,
        found.places,
        factor,
        threads(student.numel() + target.numel(), GRAIN),
    )
    return torch.tensor(factor * loss, dtype=torch.float32)
