"""`feature_mse` by Triton.

The plain mean, and `"power"` with a given power, read student and target once and write the gradient once. `"power"`
without one, and `"channel"`, read the target once more beforehand; `"l2"` reads both twice. A program leaves behind 4
to 12 bytes for 2048 elements.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from stablekd_fast.kernels import _sample_triton, _triton_finish
from stablekd_fast.kernels._checks import laid_out_like
from stablekd_fast.kernels._features import DenseOperands
from stablekd_fast.kernels._features_triton import (
    BLOCK,
    EXTENTS,
    aligned_operands,
    dequantized,
    extents,
    flat,
    operand_types,
    owners,
    split,
    tensors_of,
)
from stablekd_fast.kernels._launch import ALIGNMENTS, Listed, launch, packed, variant
from stablekd_fast.kernels.feature_mse import reference
from stablekd_fast.kernels.feature_mse.reference import Operands

_CHANNEL_EPSILON = tl.constexpr(reference.CHANNEL_EPSILON)
_POWER_FLOOR = tl.constexpr(reference.POWER_FLOOR)

# Tiles `[positions, channels]` of the moments: channels side by side in memory are read together.
_TILES = ((1024, 1), (32, 32))
_MERGED = 128
_WARPS = 4
_PARTS = 64
_LONGEST_PART = 2**19


@triton.jit(do_not_specialize=["count", *EXTENTS])
def pull_elements(
    student_at,
    target_at,
    scales_at,  # float32 [C] or [N, C] of codes, or None
    gradient_at,  # in the student's dtype, or None
    pulls_at,  # float32 [C], weights of the channels, or None
    power_at,  # float32 [], or None
    upstream_at,  # float32 [], or None
    partials_at,  # float32 [programs]
    count: tl.int64,
    outer: tl.int64,
    channels: tl.int64,
    inner: tl.int64,
    scales_stride: tl.int64,
    slope,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Weighted squared differences of BLOCK elements, and the gradient of their sum times `slope` / 2."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    lanes = tl.arange(0, BLOCK)
    # Dividing and multiplying tells the compiler of the multiple that vector loads and stores need.
    inside = first + lanes < count // ALIGN * ALIGN
    sample, channel = 0, 0
    if scales_at is not None or pulls_at is not None:
        sample, channel = owners(first, lanes, outer, channels, inner)
    student = tl.load(student_at + first + lanes, mask=inside, other=0.0).to(tl.float32)
    apart = student - dequantized(target_at + first + lanes, scales_at, scales_stride, sample, channel, inside)
    pulled = apart
    if pulls_at is not None:
        pulled *= tl.load(pulls_at + channel, mask=inside, other=0.0)
    loss = tl.sum(apart * pulled, 0)
    if power_at is not None:
        power = tl.maximum(tl.load(power_at), _POWER_FLOOR, propagate_nan=tl.PropagateNan.ALL)
        loss, slope = loss / power, slope / power
    tl.store(partials_at + tl.program_id(0), loss)
    if gradient_at is not None:
        if upstream_at is not None:
            slope *= tl.load(upstream_at)
        tl.store(gradient_at + first + lanes, (pulled * slope).to(gradient_at.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count", *EXTENTS])
def square_elements(
    target_at,
    scales_at,  # float32 [C] or [N, C] of codes, or None
    partials_at,  # float32 [programs]
    count: tl.int64,
    outer: tl.int64,
    channels: tl.int64,
    inner: tl.int64,
    scales_stride: tl.int64,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """The sum of squares of BLOCK elements of the target."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    lanes = tl.arange(0, BLOCK)
    inside = first + lanes < count // ALIGN * ALIGN
    sample, channel = 0, 0
    if scales_at is not None:
        sample, channel = owners(first, lanes, outer, channels, inner)
    target = dequantized(target_at + first + lanes, scales_at, scales_stride, sample, channel, inside)
    tl.store(partials_at + tl.program_id(0), tl.sum(target * target, 0))


@triton.jit(do_not_specialize=["count", "length", *EXTENTS])
def channel_moments(
    target_at,
    scales_at,  # float32 [C] or [N, C] of codes, or None
    means_at,  # float32 [parts, C], relative to each channel's first value
    deviations_at,  # float32 [parts, C]
    count: tl.int64,
    length: tl.int64,
    outer: tl.int64,
    channels: tl.int64,
    inner: tl.int64,
    scales_stride: tl.int64,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Means and summed squared deviations of COLS channels over `length` of the `count` values that each has."""
    start = tl.program_id(1) * length
    stop = tl.minimum(start + length, count)
    channel = (tl.program_id(0) * COLS + tl.arange(0, COLS))[None, :]
    # Relative to a value of the channel itself, so that a mean far from zero costs no digits.
    pivot = dequantized(target_at + channel * inner, scales_at, scales_stride, 0, channel, channel < channels)
    mean = tl.zeros([ROWS, COLS], tl.float32)
    deviation = tl.zeros([ROWS, COLS], tl.float32)
    seen = tl.zeros([ROWS, COLS], tl.float32)
    for row in range(start, stop, ROWS):
        run = row // inner
        sample = run // outer
        lanes = tl.arange(0, ROWS)
        runs, place = split((row - run * inner).to(tl.int32) + lanes, inner)
        samples, _ = split((run - sample * outer).to(tl.int32) + runs, outer)
        inside = (row + lanes < stop)[:, None] & (channel < channels)
        at = target_at + (((run + runs) * channels * inner) + place)[:, None] + channel * inner
        values = dequantized(at, scales_at, scales_stride, (sample + samples)[:, None], channel, inside) - pivot
        # Each lane keeps the moments of what it has seen (Welford 1962).
        seen += inside.to(tl.float32)
        apart = tl.where(inside, values - mean, 0.0)
        mean += apart / tl.maximum(seen, 1.0)
        deviation += apart * tl.where(inside, values - mean, 0.0)
    centre = tl.sum(mean * seen, 0) / (stop - start).to(tl.float32)
    shift = mean - centre[None, :]
    spread = tl.sum(deviation + seen * shift * shift, 0)
    own = tl.program_id(0) * COLS + tl.arange(0, COLS)
    tl.store(means_at + tl.program_id(1) * channels + own, centre, mask=own < channels)
    tl.store(deviations_at + tl.program_id(1) * channels + own, spread, mask=own < channels)


@triton.jit(do_not_specialize=["count", "length", "channels"])
def merge_moments(
    means_at,  # float32 [parts, C]
    deviations_at,  # float32 [parts, C]
    pulls_at,  # float32 [C]
    count: tl.int64,
    length: tl.int64,
    channels: tl.int64,
    BLOCK: tl.constexpr,
):
    """1 / (variance + epsilon) of BLOCK channels, parts merged in order (Chan, Golub, LeVeque 1979)."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < channels
    mean = tl.zeros([BLOCK], tl.float32)
    deviation = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, length):
        place = start // length * channels + channel
        added = tl.minimum(length, count - start).to(tl.float32)
        share = added / (start * 1.0 + added)
        apart = tl.load(means_at + place, mask=inside, other=0.0) - mean
        mean += apart * share
        deviation += tl.load(deviations_at + place, mask=inside, other=0.0) + apart * apart * (start * share)
    tl.store(pulls_at + channel, 1.0 / (deviation / count.to(tl.float32) + _CHANNEL_EPSILON), mask=inside)


def feature_mse(given: Operands) -> Tensor:
    found = aligned_operands(given, with_gradient=False)
    if found is None:
        return reference.feature_mse(given)
    return _loss(found, given.normalize, given.power, 1.0, None)


def feature_mse_with_grad(given: Operands, factor: float, upstream: Tensor | None) -> tuple[Tensor, Tensor]:
    found = aligned_operands(given, with_gradient=True)
    if found is None:
        return reference.feature_mse_with_grad(given, factor, upstream)
    loss = _loss(found, given.normalize, given.power, factor, packed(upstream, torch.float32))
    return loss, laid_out_like(found.gradient, given.student)


def _loss(
    found: DenseOperands, normalize: str | None, power: Tensor | None, factor: float, upstream: Tensor | None
) -> Tensor:
    if normalize == "l2":
        return _sample_triton.loss(found, factor, upstream, squared_distance=True)
    count = found.layout.numel
    pulls = None
    if normalize == "channel":
        pulls = _pulls(found)
    elif normalize == "power":
        power = _power(found) if power is None else packed(power, torch.float32)
    partials = _one_per_program(found)
    tensors = {"pulls_at": pulls, "power_at": power, "upstream_at": upstream}
    arguments = tensors_of(found) | tensors | {"partials_at": partials, "count": count}
    arguments |= extents(found.layout, found.scales) | {"slope": 2.0 * factor / count}
    launch(pull_elements, (len(partials),), arguments, *flat(count))
    return _triton_finish.total(partials, factor / count, upstream)


def _one_per_program(found: DenseOperands) -> Tensor:
    return torch.empty(triton.cdiv(found.layout.numel, BLOCK), dtype=torch.float32, device=found.student.device)


def _power(found: DenseOperands) -> Tensor:
    """The target's mean square; 0-dim, float32."""
    count = found.layout.numel
    partials = _one_per_program(found)
    arguments = _target_only(tensors_of(found)) | {"partials_at": partials, "count": count}
    arguments |= extents(found.layout, found.scales)
    launch(square_elements, (len(partials),), arguments, *flat(count))
    return _triton_finish.total(partials, 1.0 / count, None)


def _pulls(found: DenseOperands) -> Tensor:
    """1 / (variance + epsilon) of each channel of the target; float32 `[C]`."""
    channels, count = found.layout.channels, found.layout.numel // found.layout.channels
    rows, cols = _TILES[found.layout.inner == 1]
    length = min(_LONGEST_PART, triton.cdiv(max(triton.cdiv(count, _PARTS), 4 * rows), rows) * rows)
    parts = triton.cdiv(count, length)
    means, deviations, pulls = (
        torch.empty(shape, dtype=torch.float32, device=found.student.device)
        for shape in ((parts, channels), (parts, channels), channels)
    )
    places = {"means_at": means, "deviations_at": deviations}
    arguments = _target_only(tensors_of(found)) | places | {"count": count, "length": length}
    arguments |= extents(found.layout, found.scales)
    grid = (triton.cdiv(channels, cols), parts)
    launch(channel_moments, grid, arguments, {"ROWS": rows, "COLS": cols}, _WARPS)
    arguments = places | {"pulls_at": pulls, "count": count, "length": length, "channels": channels}
    launch(merge_moments, (triton.cdiv(channels, _MERGED),), arguments, {"BLOCK": _MERGED}, _WARPS)
    return pulls


def _target_only(tensors: dict) -> dict:
    return {name: tensors[name] for name in ("target_at", "scales_at")}


def specialisations() -> Iterator[Listed]:
    yield from _triton_finish.specialisations()
    yield from _sample_triton.specialisations(squared_distance=True)
    single, shape = torch.float32, dict.fromkeys(EXTENTS, 0)
    for with_gradient, align in product((False, True), ALIGNMENTS):
        for types in operand_types(with_gradient):
            for (pulls, power), upstream in product(
                ((None, None), (None, single), (single, None)), (None, single) if with_gradient else (None,)
            ):
                tensors = {"pulls_at": pulls, "power_at": power, "upstream_at": upstream}
                arguments = types | tensors | {"partials_at": single, "count": 0} | shape | {"slope": 0.0}
                listed = variant(pull_elements, arguments, *flat(align))
                wide = align > 1
                yield Listed(pull_elements, listed, wide_loads=wide, wide_stores=wide and with_gradient)
    for types in _target_types():
        for align in ALIGNMENTS:
            arguments = types | {"partials_at": single, "count": 0} | shape
            yield Listed(square_elements, variant(square_elements, arguments, *flat(align)))
        for rows, cols in _TILES:
            arguments = types | {"means_at": single, "deviations_at": single, "count": 0, "length": 0} | shape
            yield Listed(channel_moments, variant(channel_moments, arguments, {"ROWS": rows, "COLS": cols}, _WARPS))
    arguments = dict.fromkeys(("means_at", "deviations_at", "pulls_at"), single)
    arguments |= {"count": 0, "length": 0, "channels": 0}
    yield Listed(merge_moments, variant(merge_moments, arguments, {"BLOCK": _MERGED}, _WARPS))


def _target_types() -> Iterator[dict]:
    """Each type of target once."""
    for types in operand_types(with_gradient=False):
        if types["student_at"] == torch.float32:
            yield _target_only(types)
