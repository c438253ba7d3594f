"""Losses made of samples scaled to unit length, by Triton: `feature_mse` with "l2" and `feature_cosine` per sample.

A first pass takes the inner products of each sample's student and target, a second one reads both again and writes the
gradient. With u = s / |s|, v = t / |t| and ratio = |s| / |t|, u - v is (s - t * ratio) / |s|, with fewer roundings than
the difference of two quotients; the gradient is ((s - t * ratio) - s * along) * slope.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from stablekd_fast.kernels import _triton_finish
from stablekd_fast.kernels._features import DenseOperands
from stablekd_fast.kernels._features_triton import (
    BLOCK,
    EXTENTS,
    LENGTH_EPSILON,
    dequantized,
    extents,
    flat,
    operand_types,
    owners,
    tensors_of,
)
from stablekd_fast.kernels._launch import ALIGNMENTS, Listed, launch, variant

_UNITS = 5
_ADDED = 256
_WARPS = 4


@triton.jit(do_not_specialize=["size", "chunks", *EXTENTS])
def sample_products(
    student_at,
    target_at,
    scales_at,  # float32 [C] or [N, C] of codes, or None
    products_at,  # float32 [N, chunks, 3]
    size: tl.int64,
    chunks: tl.int64,
    outer: tl.int64,
    channels: tl.int64,
    inner: tl.int64,
    scales_stride: tl.int64,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Sum s * s, t * t and s * t over BLOCK elements of a sample."""
    student, target, _, _ = elements(
        student_at, target_at, scales_at, size, chunks, outer, channels, inner, scales_stride, BLOCK, ALIGN
    )
    out = products_at + 3 * tl.program_id(0).to(tl.int64)
    tl.store(out, tl.sum(student * student, 0))
    tl.store(out + 1, tl.sum(target * target, 0))
    tl.store(out + 2, tl.sum(student * target, 0))


@triton.jit(do_not_specialize=["chunks"])
def sample_units(
    products_at,  # float32 [N, chunks, 3]
    upstream_at,  # float32 [] or None
    units_at,  # float32 [N, 5]: ratio, along, slope, weight of |s - t * ratio|^2 in the loss, what is added to it
    chunks: tl.int64,
    factor,
    SQUARED_DISTANCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute what one sample's second pass needs, in double precision, as `along` is a difference of near equals."""
    sample = tl.program_id(0).to(tl.int64)
    ss, tt, st = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for start in range(0, chunks, BLOCK):
        chunk = start + tl.arange(0, BLOCK)
        at, inside = products_at + 3 * (sample * chunks + chunk), chunk < chunks
        ss += tl.load(at, mask=inside, other=0.0).to(tl.float64)
        tt += tl.load(at + 1, mask=inside, other=0.0).to(tl.float64)
        st += tl.load(at + 2, mask=inside, other=0.0).to(tl.float64)
    own, other, both = tl.sum(ss, 0), tl.sum(tt, 0) + LENGTH_EPSILON, tl.sum(st, 0)
    length = own + LENGTH_EPSILON
    cosine = both / tl.sqrt(length * other)
    slope = factor / length
    if upstream_at is not None:
        slope *= tl.load(upstream_at).to(tl.float64)
    along, weight, added = 1.0 - cosine, 0.5 / length, (0.5 / length + 0.5 / other) * LENGTH_EPSILON
    if SQUARED_DISTANCE:
        along, slope, weight, added = own / length - cosine, 2.0 * slope, 1.0 / length, 0.0 * length
    out = units_at + 5 * sample
    tl.store(out, tl.sqrt(length / other).to(tl.float32))
    tl.store(out + 1, along.to(tl.float32))
    tl.store(out + 2, slope.to(tl.float32))
    tl.store(out + 3, weight.to(tl.float32))
    tl.store(out + 4, added.to(tl.float32))


@triton.jit(do_not_specialize=["size", "chunks", *EXTENTS])
def unit_elements(
    student_at,
    target_at,
    scales_at,  # float32 [C] or [N, C] of codes, or None
    gradient_at,  # in the student's dtype, or None
    units_at,  # float32 [N, 5]
    partials_at,  # float32 [N, chunks]
    size: tl.int64,
    chunks: tl.int64,
    outer: tl.int64,
    channels: tl.int64,
    inner: tl.int64,
    scales_stride: tl.int64,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Loss and gradient of BLOCK elements of a sample."""
    program = tl.program_id(0).to(tl.int64)
    sample = program // chunks
    student, target, place, inside = elements(
        student_at, target_at, scales_at, size, chunks, outer, channels, inner, scales_stride, BLOCK, ALIGN
    )
    units = units_at + 5 * sample
    apart = student - target * tl.load(units)
    loss = tl.sum(apart * apart, 0) * tl.load(units + 3)
    loss += tl.where(program == sample * chunks, tl.load(units + 4), 0.0)
    tl.store(partials_at + program, loss)
    if gradient_at is not None:
        gradient = (apart - student * tl.load(units + 1)) * tl.load(units + 2)
        tl.store(gradient_at + place, gradient.to(gradient_at.dtype.element_ty), mask=inside)


@triton.jit
def elements(
    student_at,
    target_at,
    scales_at,
    size,
    chunks,
    outer,
    channels,
    inner,
    scales_stride,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Return student and target of this program's chunk of a sample, 0 beyond its end, and their places.

    The last value says which of them lie before the end.
    """
    # Dividing and multiplying tells the compiler of the multiple that vector loads and stores need.
    size = size // ALIGN * ALIGN
    program = tl.program_id(0).to(tl.int64)
    sample = program // chunks
    first = (program - sample * chunks) * BLOCK
    lanes = tl.arange(0, BLOCK)
    inside = first + lanes < size
    channel = 0
    if scales_at is not None:
        _, channel = owners(first, lanes, outer, channels, inner)
    place = sample * size + first + lanes
    student = tl.load(student_at + place, mask=inside, other=0.0).to(tl.float32)
    target = dequantized(target_at + place, scales_at, scales_stride, sample, channel, inside)
    return student, target, place, inside


def loss(found: DenseOperands, factor: float, upstream: Tensor | None, squared_distance: bool) -> Tensor:
    """`factor` times `upstream` times the mean over samples of |u - v|^2, or of 1 - u.v; writes the gradient."""
    samples, size = found.layout.samples, found.layout.per_sample
    chunks = triton.cdiv(size, BLOCK)
    device = found.student.device
    products = torch.empty((samples, chunks, 3), dtype=torch.float32, device=device)
    units = torch.empty((samples, _UNITS), dtype=torch.float32, device=device)
    partials = torch.empty(samples * chunks, dtype=torch.float32, device=device)
    shape = {"size": size, "chunks": chunks} | extents(found.layout, found.scales)
    arguments = _without_gradient(tensors_of(found)) | {"products_at": products} | shape
    launch(sample_products, (len(partials),), arguments, *flat(size))
    arguments = {"products_at": products, "upstream_at": upstream, "units_at": units}
    arguments |= {"chunks": chunks, "factor": factor / samples}
    launch(sample_units, (samples,), arguments, _of_units(squared_distance), _WARPS)
    arguments = tensors_of(found) | {"units_at": units, "partials_at": partials} | shape
    launch(unit_elements, (len(partials),), arguments, *flat(size))
    return _triton_finish.total(partials, factor / samples, upstream)


def specialisations(squared_distance: bool) -> Iterator[Listed]:
    single = torch.float32
    shape = dict.fromkeys(("size", "chunks", *EXTENTS), 0)
    for with_gradient, align in product((False, True), ALIGNMENTS):
        for types in operand_types(with_gradient):
            arguments = types | {"units_at": single, "partials_at": single} | shape
            listed, wide = variant(unit_elements, arguments, *flat(align)), align > 1
            yield Listed(unit_elements, listed, wide_loads=wide, wide_stores=wide and with_gradient)
            if not with_gradient:
                arguments = _without_gradient(types) | {"products_at": single} | shape
                listed = variant(sample_products, arguments, *flat(align))
                yield Listed(sample_products, listed, wide_loads=wide)
    for upstream in (None, single):
        arguments = {"products_at": single, "upstream_at": upstream, "units_at": single, "chunks": 0, "factor": 0.0}
        yield Listed(sample_units, variant(sample_units, arguments, _of_units(squared_distance), _WARPS))


def _without_gradient(tensors: dict) -> dict:
    return {name: tensor for name, tensor in tensors.items() if name != "gradient_at"}


def _of_units(squared_distance: bool) -> dict:
    return {"SQUARED_DISTANCE": squared_distance, "BLOCK": _ADDED}
