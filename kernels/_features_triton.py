"""Helpers of the Triton kernels on feature maps: operands in memory order, 8-bit codes, whose element is whose."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from stablekd_fast.kernels import _features
from stablekd_fast.kernels._checks import FLOATS
from stablekd_fast.kernels._features import DenseOperands, FeatureOperands
from stablekd_fast.kernels._launch import aligned, alignment, packed
from stablekd_fast.kernels._layout import FeatureLayout

BLOCK = 2048
"""Elements of a program that walks over memory."""

LENGTH_EPSILON = tl.constexpr(_features.LENGTH_EPSILON)

EXTENTS = ("outer", "channels", "inner", "scales_stride")
"""Arguments that say whose element is whose; `outer` counts per sample."""

# `split` is exact below 2^20, and what it divides may exceed an extent by a block of elements.
_LARGEST_EXTENT = 2**19

_STORED = {torch.float8_e4m3fn: torch.uint8}


def aligned_operands(given: FeatureOperands, with_gradient: bool) -> DenseOperands | None:
    """Return aligned operands; None where the reference must serve, extents beyond 2^19 among others."""
    found = _features.dense_operands(given, with_gradient)
    if found is None or not fits(found.layout):
        return None
    target, scales = as_bytes(aligned(found.target)), packed(found.scales, torch.float32)
    return found._replace(student=aligned(found.student), target=target, scales=scales)


def fits(found: FeatureLayout) -> bool:
    """Say whether the kernels can tell which channel and sample an element belongs to."""
    return max(found.channels, found.inner, found.outer // found.samples) <= _LARGEST_EXTENT


def as_bytes(codes: Tensor) -> Tensor:
    """float8_e4m3fn as uint8, which Triton has on all chips; everything else as it is."""
    return codes.view(_STORED.get(codes.dtype, codes.dtype))


def tensors_of(found: DenseOperands) -> dict[str, Tensor | None]:
    return arguments_of(found.student, found.target, found.scales, found.gradient)


def extents(found: FeatureLayout, scales: Tensor | None) -> dict[str, int]:
    return {
        "outer": found.outer // found.samples,
        "channels": found.channels,
        "inner": found.inner,
        "scales_stride": _features.scale_stride(scales, found),
    }


def arguments_of(student, target, scales, gradient) -> dict:
    return {"student_at": student, "target_at": target, "scales_at": scales, "gradient_at": gradient}


def flat(extent: int) -> tuple[dict[str, int], int]:
    """Constants and warps of a program that walks over `extent` elements in stretches of BLOCK.

    Without alignment every element's place takes registers of its own: fewer elements for a thread.
    """
    align = alignment(extent)
    return {"BLOCK": BLOCK, "ALIGN": align}, BLOCK // (512 if align > 1 else 256)


def operand_types(with_gradient: bool) -> Iterator[dict]:
    """The types of `arguments_of` in every combination that can occur."""
    for student, target in product(FLOATS, (*FLOATS, torch.int8, torch.uint8)):
        scales = None if target in FLOATS else torch.float32
        yield arguments_of(student, target, scales, student if with_gradient else None)


@triton.jit
def split(value, extent):
    """`value // extent` and the remainder, exact for 0 <= value < 2^20, at the price of a multiplication."""
    quotient = ((value.to(tl.float32) + 0.5) * tl.div_rn(1.0, extent.to(tl.float32))).to(tl.int32)
    return quotient, value - quotient * extent.to(tl.int32)


@triton.jit
def owners(first, lanes, outer, channels, inner):
    """Sample and channel of the elements `first + lanes` of a map `[samples, outer, channels, inner]`."""
    run = first // inner
    position = run // channels
    sample = position // outer
    runs, _ = split((first - run * inner).to(tl.int32) + lanes, inner)
    positions, channel = split((run - position * channels).to(tl.int32) + runs, channels)
    samples, _ = split((position - sample * outer).to(tl.int32) + positions, outer)
    return sample + samples, channel


@triton.jit
def dequantized(target_at, scales_at, scales_stride, sample, channel, inside):
    """Values of a target: its codes times the scale of their channel, where there are scales."""
    stored = tl.load(target_at, mask=inside, other=0)
    values = from_e4m3(stored) if target_at.dtype.element_ty == tl.uint8 else stored.to(tl.float32)
    if scales_at is not None:
        values *= tl.load(scales_at + sample * scales_stride + channel, mask=inside, other=0.0)
    return values


@triton.jit
def from_e4m3(codes):
    """The values of float8_e4m3fn codes, by integers: chips before sm_89 have nothing for it."""
    code = codes.to(tl.uint32)
    # The exponent's bias is 7 instead of 127; the product also turns subnormal numbers into what they stand for.
    magnitude = ((code & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
    magnitude = tl.where((code & 0x7F) == 0x7F, float("nan"), magnitude)
    return tl.where((code & 0x80) != 0, -magnitude, magnitude)
