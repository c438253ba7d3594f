"""Operands of attention transfer as the fused implementations take them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stablekd_fast.kernels._checks import FLOATS
from stablekd_fast.kernels.attention_transfer.reference import Operands


class PlainMaps(NamedTuple):
    """Student `[N, C, H, W]` and target `[N, D, H, W]`, each contiguous or channels-last, and the gradient (or None)
    to be written in the student's layout."""

    student: Tensor
    target: Tensor
    gradient: Tensor | None

    @property
    def samples(self) -> int:
        return self.student.shape[0]

    @property
    def places(self) -> int:
        return self.student.shape[2] * self.student.shape[3]


def plain_maps(given: Operands, with_gradient: bool) -> PlainMaps | None:
    """Return what the fused implementations take; None for powers other than 2, double precision and maps without
    elements."""
    student, target = given.student, given.target
    if given.power != 2 or student.dtype not in FLOATS or target.dtype not in FLOATS:
        return None
    if student.numel() == 0 or target.numel() == 0:
        return None
    student, target = _plain(student), _plain(target)
    return PlainMaps(student, target, torch.empty_like(student) if with_gradient else None)


def channels_last(features: Tensor) -> bool:
    """Say whether the channels of a place lie side by side in the memory of a plain map; else its places do."""
    return features.stride(1) == 1


def _plain(features: Tensor) -> Tensor:
    if features.is_contiguous() or features.is_contiguous(memory_format=torch.channels_last):
        return features
    return features.contiguous()
