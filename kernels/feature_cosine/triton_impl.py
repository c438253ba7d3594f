"""`feature_cosine` by Triton.

Per position, all channels of a few positions lie in registers: student and target are read once, the gradient is
written once. More channels than `_MOST_CHANNELS` are left to the reference. Per sample both are read twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from stablekd_fast.kernels import _sample_triton, _triton_finish
from stablekd_fast.kernels._checks import laid_out_like
from stablekd_fast.kernels._features import DenseOperands
from stablekd_fast.kernels._features_triton import (
    EXTENTS,
    LENGTH_EPSILON,
    aligned_operands,
    dequantized,
    extents,
    operand_types,
    split,
    tensors_of,
)
from stablekd_fast.kernels._launch import Listed, alignment, launch, packed, variant
from stablekd_fast.kernels.feature_cosine import reference
from stablekd_fast.kernels.feature_cosine.reference import Operands

_MOST_CHANNELS = {True: 8192, False: 2048}
"""By whether channels lie side by side in memory."""

_CHANNEL_BLOCKS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


class _Tiling(NamedTuple):
    channels_last: bool
    positions: int
    channels: int
    align: int
    warps: int

    @property
    def constants(self) -> dict[str, int]:
        return {"POSITIONS": self.positions, "CHANNELS": self.channels, "ALIGN": self.align}


def _tiling(channels_last: bool, channels: int) -> _Tiling:
    """16 elements of each operand for a thread, 8 where an element's place takes registers of its own."""
    block = next(block for block in _CHANNEL_BLOCKS if block >= channels)
    align = alignment(channels) if channels_last else 1
    per_thread = 16 if align > 1 else 8
    # Positions side by side in memory are read 8 at a time where that many fit.
    positions = max(1 if channels_last else min(8, 4096 // block), 128 * per_thread // block)
    return _Tiling(channels_last, positions, block, align, min(16, max(4, positions * block // (32 * per_thread))))


@triton.jit(do_not_specialize=["positions", *EXTENTS])
def last_angles(
    student_at,  # [positions, C]
    target_at,
    scales_at,  # float32 [C] or [N, C] of codes, or None
    gradient_at,  # in the student's dtype, or None
    upstream_at,  # float32 [], or None
    partials_at,  # float32 [programs]
    positions: tl.int64,
    outer: tl.int64,
    channels: tl.int64,
    inner: tl.int64,
    scales_stride: tl.int64,
    slope,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Loss and gradient of POSITIONS positions whose channels lie side by side in memory."""
    # Dividing and multiplying tells the compiler of the multiple that vector loads and stores need.
    channels = channels // ALIGN * ALIGN
    position = tl.program_id(0).to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)
    channel = tl.arange(0, CHANNELS)[None, :]
    inside = (position < positions)[:, None] & (channel < channels.to(tl.int32))
    place = (position * channels)[:, None] + channel
    sample = (position // outer)[:, None]
    student = tl.load(student_at + place, mask=inside, other=0.0).to(tl.float32)
    target = dequantized(target_at + place, scales_at, scales_stride, sample, channel, inside)
    apart, distance, length = angles(student, target, 1)
    tl.store(partials_at + tl.program_id(0), tl.sum(tl.where(position < positions, distance, 0.0), 0))
    if gradient_at is not None:
        if upstream_at is not None:
            slope *= tl.load(upstream_at)
        gradient = (apart - student * distance[:, None]) * (slope / length)[:, None]
        tl.store(gradient_at + place, gradient.to(gradient_at.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["positions", *EXTENTS])
def first_angles(
    student_at,  # [..., C, inner]
    target_at,
    scales_at,  # float32 [C] or [N, C] of codes, or None
    gradient_at,  # in the student's dtype, or None
    upstream_at,  # float32 [], or None
    partials_at,  # float32 [programs]
    positions: tl.int64,
    outer: tl.int64,
    channels: tl.int64,
    inner: tl.int64,
    scales_stride: tl.int64,
    slope,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Loss and gradient of POSITIONS positions whose channels lie `inner` elements apart."""
    first = tl.program_id(0).to(tl.int64) * POSITIONS
    lanes = tl.arange(0, POSITIONS)
    map_first = first // inner
    maps, within = split((first - map_first * inner).to(tl.int32) + lanes, inner)
    samples, _ = split((map_first % outer).to(tl.int32) + maps, outer)
    sample = (map_first // outer + samples)[None, :]
    present = first + lanes < positions
    channel = tl.arange(0, CHANNELS)[:, None]
    inside = present[None, :] & (channel < channels)
    place = ((map_first + maps) * channels * inner + within)[None, :] + channel * inner
    student = tl.load(student_at + place, mask=inside, other=0.0).to(tl.float32)
    target = dequantized(target_at + place, scales_at, scales_stride, sample, channel, inside)
    apart, distance, length = angles(student, target, 0)
    tl.store(partials_at + tl.program_id(0), tl.sum(tl.where(present, distance, 0.0), 0))
    if gradient_at is not None:
        if upstream_at is not None:
            slope *= tl.load(upstream_at)
        gradient = (apart - student * distance[None, :]) * (slope / length)[None, :]
        tl.store(gradient_at + place, gradient.to(gradient_at.dtype.element_ty), mask=inside)


@triton.jit
def angles(student, target, AXIS: tl.constexpr):
    """(u - v) |s|, 1 - u.v and |s|^2 of vectors along AXIS; see `reference` for why nothing cancels."""
    length = tl.sum(student * student, AXIS) + LENGTH_EPSILON
    other = tl.sum(target * target, AXIS) + LENGTH_EPSILON
    apart = student - target * tl.expand_dims(tl.sqrt(length / other), AXIS)
    distance = tl.sum(apart * apart, AXIS) / length
    return apart, 0.5 * (distance + (1.0 / length + 1.0 / other) * LENGTH_EPSILON), length


def feature_cosine(given: Operands) -> Tensor:
    found = _operands(given, with_gradient=False)
    if found is None:
        return reference.feature_cosine(given)
    return _loss(found, given.per, 1.0, None)


def feature_cosine_with_grad(given: Operands, factor: float, upstream: Tensor | None) -> tuple[Tensor, Tensor]:
    found = _operands(given, with_gradient=True)
    if found is None:
        return reference.feature_cosine_with_grad(given, factor, upstream)
    loss = _loss(found, given.per, factor, packed(upstream, torch.float32))
    return loss, laid_out_like(found.gradient, given.student)


def _operands(given: Operands, with_gradient: bool) -> DenseOperands | None:
    found = aligned_operands(given, with_gradient)
    if found is None or given.per == "sample":
        return found
    return found if found.layout.channels <= _MOST_CHANNELS[found.layout.inner == 1] else None


def _loss(found: DenseOperands, per: str, factor: float, upstream: Tensor | None) -> Tensor:
    if per == "sample":
        return _sample_triton.loss(found, factor, upstream, squared_distance=False)
    layout = found.layout
    positions = layout.numel // layout.channels
    tiling = _tiling(layout.inner == 1, layout.channels)
    programs = triton.cdiv(positions, tiling.positions)
    partials = torch.empty(programs, dtype=torch.float32, device=found.student.device)
    arguments = tensors_of(found) | {"upstream_at": upstream, "partials_at": partials, "positions": positions}
    arguments |= extents(layout, found.scales) | {"slope": factor / positions}
    kernel = last_angles if tiling.channels_last else first_angles
    launch(kernel, (programs,), arguments, tiling.constants, tiling.warps)
    return _triton_finish.total(partials, factor / positions, upstream)


def specialisations() -> Iterator[Listed]:
    yield from _triton_finish.specialisations()
    yield from _sample_triton.specialisations(squared_distance=False)
    single, shape = torch.float32, dict.fromkeys(EXTENTS, 0)
    for with_gradient, tiling in product((False, True), _tilings()):
        for types in operand_types(with_gradient):
            for upstream in (None, single) if with_gradient else (None,):
                arguments = types | {"upstream_at": upstream, "partials_at": single, "positions": 0}
                arguments |= shape | {"slope": 0.0}
                kernel = last_angles if tiling.channels_last else first_angles
                wide = tiling.align > 1
                listed = variant(kernel, arguments, tiling.constants, tiling.warps)
                yield Listed(kernel, listed, wide_loads=wide, wide_stores=wide and with_gradient)


def _tilings() -> set[_Tiling]:
    return {
        _tiling(channels_last, channels)
        for channels_last, most in _MOST_CHANNELS.items()
        for block in _CHANNEL_BLOCKS
        for channels in (block, block - 1)
        if block <= most
    }
