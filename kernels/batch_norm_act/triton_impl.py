"""`batch_norm_act` and its gradient by Triton: maps `[rows, channels]` in memory, channels-last or without places.

Forward reads x twice and writes y once; backward reads its gradient and x twice, y where a residual was added, and
writes what is asked for once.
A first kernel leaves behind what each part of the rows has to say of its channels; the second one puts the parts
together, in an order that never changes, and writes the map. Maps that are so large that the second kernel would be
busy with the parts of others have them put together by a kernel of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from stablekd_fast.kernels._checks import FLOATS
from stablekd_fast.kernels._launch import ALIGNMENTS, Listed, aligned, alignment, launch, variant
from stablekd_fast.kernels._layout import laid_out_as
from stablekd_fast.kernels.batch_norm_act import reference

_TILE = {8: 4096, 1: 2048}
"""Elements that a program holds at a time, by the alignment of a row: without one each place takes registers."""
_COLUMNS = (16, 32, 64)
"""Channels of a tile: side by side in memory, they are read together."""
_WARPS = 8
_PARTS = 128
"""The parts of the rows that each program of the second kernel puts together, at the most."""
_AT_ONCE = 64
"""How many of them at once."""
_LARGE = 2**22
"""Elements of a map from which on putting parts together is left to a kernel of its own."""
_MANY_PARTS = 512
"""The parts then, at the most."""
_MERGING = {"PARTS": 128, "COLS": 16}
"""The parts that this kernel puts together at once, and of how many channels."""
_LARGEST_EXTENT = 2**19

_EXTENTS = ("rows", "channels", "length", "parts")


@triton.jit(do_not_specialize=list(_EXTENTS[:3]))
def norm_moments(
    x_at,
    firsts_at,  # float32 [parts, C], means
    seconds_at,  # float32 [parts, C], summed squared deviations
    rows: tl.int64,
    channels: tl.int64,
    length: tl.int64,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Means and summed squared deviations of COLS channels over `length` rows."""
    channels = channels // ALIGN * ALIGN
    start = tl.program_id(1) * length
    stop = tl.minimum(start + length, rows)
    lanes = tl.arange(0, ROWS)
    places, channel, _ = tile(tl.program_id(0), lanes, channels, COLS)
    mean = tl.zeros([ROWS, COLS], tl.float32)
    deviation = tl.zeros([ROWS, COLS], tl.float32)
    seen = 0.0
    for row in range(start, stop, ROWS):
        seen += 1.0
        inside = (row + lanes < stop)[:, None] & (channel < channels)[None, :]
        values = tl.load(x_at + row * channels + places, mask=inside, other=0.0).to(tl.float32)
        # Each lane keeps the moments of what it has seen (Welford 1962).
        apart = tl.where(inside, values - mean, 0.0)
        mean += apart * (1.0 / seen)
        deviation += apart * tl.where(inside, values - mean, 0.0)
    counts = ((stop - start - lanes + (ROWS - 1)) // ROWS).to(tl.float32)[:, None]
    centre = tl.sum(mean * counts, 0) / (stop - start).to(tl.float32)
    shift = mean - centre[None, :]
    spread = tl.sum(deviation + counts * shift * shift, 0)
    own = tl.program_id(1) * channels + channel
    tl.store(firsts_at + own, centre, mask=channel < channels)
    tl.store(seconds_at + own, spread, mask=channel < channels)


@triton.jit(do_not_specialize=list(_EXTENTS))
def merge_norm_moments(
    firsts_at,  # float32 [parts, C]
    seconds_at,  # float32 [parts, C]
    mean_at,  # float32 [C]
    variance_at,  # float32 [C]
    running_mean_at,  # float32 [C] or None
    running_variance_at,  # float32 [C] or None
    batches_at,  # int64 [] or None
    rows: tl.int64,
    channels: tl.int64,
    length: tl.int64,
    parts: tl.int64,
    momentum,
    PARTS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Mean and variance of COLS channels, of all parts; and the running ones, if there are some."""
    channel = tl.program_id(0) * COLS + tl.arange(0, COLS)
    mean, variance = merged(firsts_at, seconds_at, channel, rows, channels, length, parts, PARTS)
    keep_moments(mean_at, variance_at, running_mean_at, running_variance_at, batches_at, mean, variance, channel,
                 rows, channels, momentum, tl.program_id(0) == 0)  # fmt: skip


@triton.jit(do_not_specialize=list(_EXTENTS))
def norm_apply(
    x_at,
    residual_at,  # in x's dtype, or None
    y_at,
    weight_at,  # float32 [C]
    bias_at,  # float32 [C]
    firsts_at,  # float32 [parts, C], or mean and variance [C] where there are no parts
    seconds_at,
    mean_at,  # float32 [C], or None where there are no parts
    variance_at,  # float32 [C]
    running_mean_at,  # float32 [C] or None
    running_variance_at,  # float32 [C] or None
    batches_at,  # int64 [] or None
    rows: tl.int64,
    channels: tl.int64,
    length: tl.int64,
    parts: tl.int64,
    momentum,
    eps,
    RELU: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """ROWS rows of COLS channels of y; the first rows' program keeps the moments."""
    channels = channels // ALIGN * ALIGN
    lanes = tl.arange(0, ROWS)
    places, channel, known = tile(tl.program_id(0), lanes, channels, COLS)
    if PARTS == 1:
        mean = tl.load(firsts_at + channel, mask=known, other=0.0)
        variance = tl.load(seconds_at + channel, mask=known, other=0.0)
    else:
        mean, variance = merged(firsts_at, seconds_at, channel, rows, channels, length, parts, PARTS)
        if tl.program_id(1) == 0:
            keep_moments(mean_at, variance_at, running_mean_at, running_variance_at, batches_at, mean, variance,
                         channel, rows, channels, momentum, tl.program_id(0) == 0)  # fmt: skip
    scale = tl.load(weight_at + channel, mask=known, other=0.0) * tl.rsqrt(variance + eps)
    bias = tl.load(bias_at + channel, mask=known, other=0.0)
    row = tl.program_id(1).to(tl.int64) * ROWS
    inside = (row + lanes < rows)[:, None] & known[None, :]
    here = row * channels + places
    y = (tl.load(x_at + here, mask=inside, other=0.0).to(tl.float32) - mean[None, :]) * scale[None, :] + bias[None, :]
    if residual_at is not None:
        y += tl.load(residual_at + here, mask=inside, other=0.0).to(tl.float32)
    if RELU:
        y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(y_at + here, y.to(y_at.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=list(_EXTENTS[:3]))
def norm_gradient_sums(
    gradient_at,
    x_at,
    y_at,  # in x's dtype, or None where x says where the ReLU let through
    weight_at,  # float32 [C]
    bias_at,  # float32 [C]
    mean_at,  # float32 [C]
    variance_at,  # float32 [C]
    firsts_at,  # float32 [parts, C], sums of the gradient
    seconds_at,  # float32 [parts, C], sums of its products with the normalised x
    rows: tl.int64,
    channels: tl.int64,
    length: tl.int64,
    eps,
    RELU: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """What `length` rows contribute to the gradients with respect to bias and weight of COLS channels."""
    channels = channels // ALIGN * ALIGN
    start = tl.program_id(1) * length
    stop = tl.minimum(start + length, rows)
    lanes = tl.arange(0, ROWS)
    places, channel, known = tile(tl.program_id(0), lanes, channels, COLS)
    mean = tl.load(mean_at + channel, mask=known, other=0.0)[None, :]
    deviation = tl.rsqrt(tl.load(variance_at + channel, mask=known, other=1.0) + eps)
    scale = (tl.load(weight_at + channel, mask=known, other=0.0) * deviation)[None, :]
    bias = tl.load(bias_at + channel, mask=known, other=0.0)[None, :]
    plain = tl.zeros([ROWS, COLS], tl.float32)
    weighted = tl.zeros([ROWS, COLS], tl.float32)
    for row in range(start, stop, ROWS):
        inside = (row + lanes < stop)[:, None] & known[None, :]
        here = row * channels + places
        centred = tl.load(x_at + here, mask=inside, other=0.0).to(tl.float32) - mean
        passed = incoming(gradient_at, y_at, here, inside, centred, scale, bias, RELU)
        plain += passed
        weighted += passed * centred
    own = tl.program_id(1) * channels + channel
    tl.store(firsts_at + own, tl.sum(plain, 0), mask=known)
    tl.store(seconds_at + own, tl.sum(weighted, 0) * deviation, mask=known)


@triton.jit(do_not_specialize=["channels", "parts"])
def merge_norm_gradient_sums(
    firsts_at,  # float32 [parts, C]
    seconds_at,  # float32 [parts, C]
    bias_gradient_at,  # float32 [C]
    weight_gradient_at,  # float32 [C]
    channels: tl.int64,
    parts: tl.int64,
    PARTS: tl.constexpr,
    COLS: tl.constexpr,
):
    """The sums of COLS channels over all parts."""
    channel = tl.program_id(0) * COLS + tl.arange(0, COLS)
    known = channel < channels
    tl.store(bias_gradient_at + channel, summed(firsts_at, channel, channels, parts, PARTS), mask=known)
    tl.store(weight_gradient_at + channel, summed(seconds_at, channel, channels, parts, PARTS), mask=known)


@triton.jit(do_not_specialize=["rows", "channels", "parts"])
def norm_gradient(
    gradient_at,
    x_at,
    y_at,  # in x's dtype, or None where x says where the ReLU let through
    x_gradient_at,
    residual_gradient_at,  # in x's dtype, or None
    weight_at,  # float32 [C]
    bias_at,  # float32 [C]
    mean_at,  # float32 [C]
    variance_at,  # float32 [C]
    firsts_at,  # float32 [parts, C]: of bias and weight, sums of parts; or gradients [C] where there are no parts
    seconds_at,
    bias_gradient_at,  # float32 [C], or None where there are no parts
    weight_gradient_at,  # float32 [C], or None where there are no parts
    rows: tl.int64,
    channels: tl.int64,
    parts: tl.int64,
    eps,
    RELU: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """ROWS rows of COLS channels of the gradients with respect to x and the residual."""
    channels = channels // ALIGN * ALIGN
    lanes = tl.arange(0, ROWS)
    places, channel, known = tile(tl.program_id(0), lanes, channels, COLS)
    if PARTS == 1:
        plain = tl.load(firsts_at + channel, mask=known, other=0.0)
        weighted = tl.load(seconds_at + channel, mask=known, other=0.0)
    else:
        plain = summed(firsts_at, channel, channels, parts, PARTS)
        weighted = summed(seconds_at, channel, channels, parts, PARTS)
        if tl.program_id(1) == 0:
            tl.store(bias_gradient_at + channel, plain, mask=known)
            tl.store(weight_gradient_at + channel, weighted, mask=known)
    mean = tl.load(mean_at + channel, mask=known, other=0.0)
    deviation = tl.rsqrt(tl.load(variance_at + channel, mask=known, other=1.0) + eps)
    scale = tl.load(weight_at + channel, mask=known, other=0.0) * deviation
    bias = tl.load(bias_at + channel, mask=known, other=0.0)
    row = tl.program_id(1).to(tl.int64) * ROWS
    inside = (row + lanes < rows)[:, None] & known[None, :]
    here = row * channels + places
    count = rows.to(tl.float32)
    centred = tl.load(x_at + here, mask=inside, other=0.0).to(tl.float32) - mean[None, :]
    passed = incoming(gradient_at, y_at, here, inside, centred, scale[None, :], bias[None, :], RELU)
    normalised = centred * deviation[None, :]
    found = (passed - (plain / count)[None, :] - normalised * (weighted / count)[None, :]) * scale[None, :]
    tl.store(x_gradient_at + here, found.to(x_gradient_at.dtype.element_ty), mask=inside)
    if residual_gradient_at is not None:
        tl.store(residual_gradient_at + here, passed.to(residual_gradient_at.dtype.element_ty), mask=inside)


@triton.jit
def tile(column, lanes, channels, COLS: tl.constexpr):
    """Where the elements of a tile lie, from the first of its rows on; its channels, and which of them there are."""
    channel = column * COLS + tl.arange(0, COLS)
    places = lanes[:, None] * channels.to(tl.int32) + channel[None, :]
    return places, channel, channel < channels


@triton.jit
def merged(firsts_at, seconds_at, channel, rows, channels, length, parts, PARTS: tl.constexpr):
    """Mean and variance over all parts (Chan, Golub, LeVeque 1979), PARTS of them at a time."""
    mean = tl.zeros([channel.shape[0]], tl.float32)
    deviation = tl.zeros([channel.shape[0]], tl.float32)
    seen = 0.0
    for first in range(0, parts, PARTS):
        part, places, inside = parts_of(first, channel, channels, parts, PARTS)
        counts = tl.where(part < parts, tl.minimum(length, rows - part * length), 0).to(tl.float32)[:, None]
        centres = tl.load(firsts_at + places, mask=inside, other=0.0)
        spreads = tl.load(seconds_at + places, mask=inside, other=0.0)
        added = tl.minimum(rows, (first + PARTS) * length).to(tl.float32) - seen
        centre = tl.sum(centres * counts, 0) / added
        apart = centres - centre[None, :]
        spread = tl.sum(spreads + counts * apart * apart, 0)
        share = added / (seen + added)
        shift = centre - mean
        mean += shift * share
        deviation += spread + shift * shift * (seen * share)
        seen += added
    return mean, deviation / rows.to(tl.float32)


@triton.jit
def summed(sums_at, channel, channels, parts, PARTS: tl.constexpr):
    """Sums over all parts, PARTS of them at a time."""
    total = tl.zeros([channel.shape[0]], tl.float32)
    for first in range(0, parts, PARTS):
        _, places, inside = parts_of(first, channel, channels, parts, PARTS)
        total += tl.sum(tl.load(sums_at + places, mask=inside, other=0.0), 0)
    return total


@triton.jit
def parts_of(first, channel, channels, parts, PARTS: tl.constexpr):
    """PARTS parts, where their values of some channels lie, and which there are."""
    part = first + tl.arange(0, PARTS)
    places = part[:, None] * channels + channel[None, :]
    return part, places, (part < parts)[:, None] & (channel < channels)[None, :]


@triton.jit
def keep_moments(mean_at, variance_at, running_mean_at, running_variance_at, batches_at, mean, variance, channel, rows,
                 channels, momentum, counts):  # fmt: skip
    """Write a batch's mean and variance, and bring the running ones up to date as torch does: the variance unbiased."""
    known = channel < channels
    tl.store(mean_at + channel, mean, mask=known)
    tl.store(variance_at + channel, variance, mask=known)
    if running_mean_at is not None:
        before = tl.load(running_mean_at + channel, mask=known, other=0.0)
        tl.store(running_mean_at + channel, before * (1.0 - momentum) + mean * momentum, mask=known)
        unbiased = variance * (rows.to(tl.float32) / (rows - 1).to(tl.float32))
        before = tl.load(running_variance_at + channel, mask=known, other=0.0)
        tl.store(running_variance_at + channel, before * (1.0 - momentum) + unbiased * momentum, mask=known)
    if batches_at is not None and counts:
        tl.store(batches_at, tl.load(batches_at) + 1)


@triton.jit
def incoming(gradient_at, y_at, here, inside, centred, scale, bias, RELU: tl.constexpr):
    """The gradient behind the ReLU: nothing comes through where y, or what it was made of, is not above zero."""
    passed = tl.load(gradient_at + here, mask=inside, other=0.0).to(tl.float32)
    if y_at is not None:
        passed = tl.where(tl.load(y_at + here, mask=inside, other=0.0).to(tl.float32) > 0, passed, 0.0)
    elif RELU:
        passed = tl.where(centred * scale + bias > 0, passed, 0.0)
    return passed


class _Plan(NamedTuple):
    """How a map `[rows, channels]` is gone through."""

    rows: int
    channels: int
    columns: int
    """The channels of a tile."""
    length: int
    """The rows of a part."""

    @property
    def parts(self) -> int:
        return triton.cdiv(self.rows, self.length)

    @property
    def apart(self) -> bool:
        """Whether a kernel of its own puts the parts together."""
        return self.rows * self.channels >= _LARGE

    @property
    def constants(self) -> dict[str, int]:
        return _tiles(self.columns, alignment(self.channels))

    @property
    def merging(self) -> dict[str, int]:
        """What the second kernel is told of the parts."""
        return {"PARTS": 1 if self.apart else _AT_ONCE}

    def grid(self, parts: int | None = None) -> tuple[int, int]:
        """Programs for so many parts; by default one for each tile."""
        tiles = triton.cdiv(self.rows, self.constants["ROWS"])
        return triton.cdiv(self.channels, self.columns), tiles if parts is None else parts


def takes(x: Tensor, weight: Tensor) -> bool:
    """Say whether the kernels compute this map."""
    flat = x.is_contiguous() if x.dim() == 2 else x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    known = x.dtype in FLOATS and weight.dtype == torch.float32
    return flat and known and 0 < x.numel() and x.shape[1] <= _LARGEST_EXTENT


def batch_norm_act(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    batches: Tensor | None,
    momentum: float,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    running = (running_mean, running_var, batches)
    written_in_place = [tensor for tensor in running if tensor is not None]
    if not takes(x, weight) or any(aligned(tensor) is not tensor for tensor in written_in_place):
        return reference.batch_norm_act(x, residual, weight, bias, *running, momentum, eps, relu)
    x, plan = aligned(x), _plan(x)
    y, mean, variance = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
    firsts, seconds = _sums(x, plan)
    extents = {"rows": plan.rows, "channels": plan.channels, "length": plan.length}
    sums = {"firsts_at": firsts, "seconds_at": seconds}
    launch(norm_moments, plan.grid(plan.parts), {"x_at": x} | sums | extents, plan.constants, _WARPS)
    kept = _kept(mean, variance, *running)
    extents |= {"parts": plan.parts, "momentum": float(momentum)}
    if plan.apart:
        launch(
            merge_norm_moments, (triton.cdiv(plan.channels, _MERGING["COLS"]),), sums | kept | extents, _MERGING, _WARPS
        )
        sums, kept = {"firsts_at": mean, "seconds_at": variance}, _kept(None, None, None, None, None)
    added = None if residual is None else aligned(laid_out_as(residual, x))
    vectors = {"weight_at": aligned(weight), "bias_at": aligned(bias)}
    arguments = {"x_at": x, "residual_at": added, "y_at": y} | vectors | sums | kept | extents | {"eps": float(eps)}
    launch(norm_apply, plan.grid(), arguments, {"RELU": relu} | plan.merging | plan.constants, _WARPS)
    return y, mean, variance


def batch_norm_act_backward(
    gradient: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    eps: float,
    relu: bool,
    with_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not takes(x, weight):
        given = (gradient, x, y, weight, bias, mean, variance)
        return reference.batch_norm_act_backward(*given, eps, relu, with_residual)
    x, plan = aligned(x), _plan(x)
    x_gradient = torch.empty_like(x)
    residual_gradient = torch.empty_like(x) if with_residual else None
    weight_gradient, bias_gradient = torch.empty_like(weight), torch.empty_like(weight)
    firsts, seconds = _sums(x, plan)
    sums = {"firsts_at": firsts, "seconds_at": seconds}
    maps = {"gradient_at": aligned(laid_out_as(gradient, x)), "x_at": x, "y_at": None if y is None else aligned(y)}
    vectors = {"weight_at": aligned(weight), "bias_at": aligned(bias)}
    vectors |= {"mean_at": aligned(mean), "variance_at": aligned(variance)}
    extents = {"rows": plan.rows, "channels": plan.channels}
    arguments = maps | vectors | sums | extents | {"length": plan.length, "eps": float(eps)}
    launch(norm_gradient_sums, plan.grid(plan.parts), arguments, {"RELU": relu} | plan.constants, _WARPS)
    found = {"bias_gradient_at": bias_gradient, "weight_gradient_at": weight_gradient}
    if plan.apart:
        arguments = sums | found | {"channels": plan.channels, "parts": plan.parts}
        grid = (triton.cdiv(plan.channels, _MERGING["COLS"]),)
        launch(merge_norm_gradient_sums, grid, arguments, _MERGING, _WARPS)
        sums, found = {"firsts_at": bias_gradient, "seconds_at": weight_gradient}, dict.fromkeys(found)
    written = {"x_gradient_at": x_gradient, "residual_gradient_at": residual_gradient}
    arguments = maps | written | vectors | sums | found | extents | {"parts": plan.parts, "eps": float(eps)}
    launch(norm_gradient, plan.grid(), arguments, {"RELU": relu} | plan.merging | plan.constants, _WARPS)
    return (
        x_gradient,
        weight_gradient,
        bias_gradient,
        x.new_empty(0) if residual_gradient is None else residual_gradient,
    )


def _plan(x: Tensor) -> _Plan:
    channels = x.shape[1]
    rows = x.numel() // channels
    columns = next((width for width in _COLUMNS if width >= channels), _COLUMNS[-1])
    blocks, tall = triton.cdiv(channels, columns), _tiles(columns, alignment(channels))["ROWS"]
    # Each program of the second kernel reads all parts of its channels: the more programs, the fewer parts.
    most = _MANY_PARTS if rows * channels >= _LARGE else max(_PARTS // blocks, 16)
    length = triton.cdiv(triton.cdiv(rows, tall), most) * tall
    return _Plan(rows, channels, columns, length)


def _tiles(columns: int, align: int) -> dict[str, int]:
    return {"ROWS": _TILE[align] // columns, "COLS": columns, "ALIGN": align}


def _sums(x: Tensor, plan: _Plan) -> Tensor:
    """Memory for two values of each part and channel."""
    return torch.empty(2, plan.parts, plan.channels, dtype=torch.float32, device=x.device)


def _kept(mean, variance, running_mean, running_variance, batches) -> dict:
    return {
        "mean_at": mean,
        "variance_at": variance,
        "running_mean_at": running_mean,
        "running_variance_at": running_variance,
        "batches_at": batches,
    }


def specialisations() -> Iterator[Listed]:
    single, extents = torch.float32, dict.fromkeys(_EXTENTS[:3], 0)
    sums = {"firsts_at": single, "seconds_at": single}
    vectors = dict.fromkeys(("weight_at", "bias_at", "mean_at", "variance_at"), single)
    none = _kept(None, None, None, None, None)
    kept = [_kept(single, single, *running) for running in _RUNNING]
    for chosen in kept:
        arguments = sums | chosen | extents | {"parts": 0, "momentum": 0.0}
        yield Listed(merge_norm_moments, variant(merge_norm_moments, arguments, _MERGING, _WARPS))
    arguments = sums | {"bias_gradient_at": single, "weight_gradient_at": single, "channels": 0, "parts": 0}
    yield Listed(merge_norm_gradient_sums, variant(merge_norm_gradient_sums, arguments, _MERGING, _WARPS))
    for dtype, align, columns in product(FLOATS, ALIGNMENTS, _COLUMNS):
        tiles, wide = _tiles(columns, align), align > 1
        listed = variant(norm_moments, {"x_at": dtype} | sums | extents, tiles, _WARPS)
        yield Listed(norm_moments, listed, wide_loads=wide)
        for residual, relu, (parts, chosen) in product(
            (None, dtype), (False, True), ((1, none), *((_AT_ONCE, one) for one in kept))
        ):
            arguments = {"x_at": dtype, "residual_at": residual, "y_at": dtype, "weight_at": single, "bias_at": single}
            arguments |= sums | chosen | extents | {"parts": 0, "momentum": 0.0, "eps": 0.0}
            listed = variant(norm_apply, arguments, {"RELU": relu, "PARTS": parts} | tiles, _WARPS)
            yield Listed(norm_apply, listed, wide_loads=wide, wide_stores=wide)
        for y, relu in ((None, False), (None, True), (dtype, True)):
            maps = {"gradient_at": dtype, "x_at": dtype, "y_at": y}
            arguments = maps | vectors | sums | extents | {"eps": 0.0}
            listed = variant(norm_gradient_sums, arguments, {"RELU": relu} | tiles, _WARPS)
            yield Listed(norm_gradient_sums, listed, wide_loads=wide)
            for residual, parts in product((None, dtype), (1, _AT_ONCE)):
                found = None if parts == 1 else single
                arguments = maps | {"x_gradient_at": dtype, "residual_gradient_at": residual} | vectors | sums
                arguments |= {"bias_gradient_at": found, "weight_gradient_at": found}
                arguments |= {"rows": 0, "channels": 0, "parts": 0, "eps": 0.0}
                listed = variant(norm_gradient, arguments, {"RELU": relu, "PARTS": parts} | tiles, _WARPS)
                yield Listed(norm_gradient, listed, wide_loads=wide, wide_stores=wide)


_RUNNING = ((None, None, None), (torch.float32, torch.float32, None), (torch.float32, torch.float32, torch.int64))
"""The types of running statistics in every combination that can occur."""
