"""`attention_transfer` by Triton, for the power 2.

A first kernel reads student and target and writes their attention maps, a second one has a program for each sample and
turns the maps into the pull of each place, a third one multiplies the student by its place's pull and adds up the loss.
The student is read twice, the target once; maps are a channel's size.

With the maps a and b of a sample, u = a / |a|, v = b / |b| and ratio = |a| / |b|, u - v is (a - b * ratio) / |a|, with
fewer roundings than the difference of two quotients. The gradient is s * pull, with
pull = ((a - b * ratio) - a * along) * slope and along = u.(u - v).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from stablekd_fast.kernels import _triton_finish
from stablekd_fast.kernels._checks import FLOATS, laid_out_like
from stablekd_fast.kernels._features_triton import LENGTH_EPSILON
from stablekd_fast.kernels._launch import ALIGNMENTS, Listed, aligned, alignment, launch, packed, variant
from stablekd_fast.kernels._triton_finish import sum_partials
from stablekd_fast.kernels.attention_transfer import reference
from stablekd_fast.kernels.attention_transfer._memory import PlainMaps, channels_last, plain_maps
from stablekd_fast.kernels.attention_transfer.reference import Operands

_TILE = 2048
"""Elements of a program's tile of places and channels."""

_CHANNEL_BLOCKS = {True: (16, 32, 64, 128, 256), False: (16, 32, 64)}
"""By whether all maps are channels-last; where places lie side by side, a tile has at least 32 of them."""

_PLACE_BLOCKS = (256, 1024, 4096)
"""Places of a sample that the second kernel takes at a time."""

_ADDED = 1024
"""Samples whose losses are added at a time, as `_triton_finish` does."""


class _Tiling(NamedTuple):
    channels: int
    align: int

    @property
    def places(self) -> int:
        return _TILE // self.channels

    @property
    def constants(self) -> dict[str, int]:
        return {"PLACES": self.places, "CHANNELS": self.channels, "ALIGN": self.align}

    @property
    def warps(self) -> int:
        """Without alignment every element's place takes registers of its own: fewer elements for a thread."""
        return 4 if self.align > 1 else 8


def _tiling(*maps: Tensor) -> _Tiling:
    blocks = _CHANNEL_BLOCKS[all(map(channels_last, maps))]
    channels = max(features.shape[1] for features in maps)
    side_by_side = [x.shape[1] if channels_last(x) else x.shape[2] * x.shape[3] for x in maps]
    return _Tiling(next((block for block in blocks if block >= channels), blocks[-1]), alignment(*side_by_side))


@triton.jit(do_not_specialize=["chunks", "size", "student_channels", "target_channels"])
def attention_maps(
    student_at,
    target_at,
    maps_at,  # float32 [N, 2, size]: the student's and the target's
    chunks: tl.int64,
    size: tl.int64,
    student_channels: tl.int64,
    target_channels: tl.int64,
    STUDENT_LAST: tl.constexpr,
    TARGET_LAST: tl.constexpr,
    PLACES: tl.constexpr,
    CHANNELS: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """The mean of x^2 over the channels at PLACES places of a sample, of student and target."""
    program = tl.program_id(0).to(tl.int64)
    sample = program // chunks
    first = (program - sample * chunks) * PLACES
    own = mean_squares(student_at, sample, first, size, student_channels, STUDENT_LAST, PLACES, CHANNELS, ALIGN)
    other = mean_squares(target_at, sample, first, size, target_channels, TARGET_LAST, PLACES, CHANNELS, ALIGN)
    place = first + tl.arange(0, PLACES)
    out = maps_at + 2 * sample * size + place
    tl.store(out, own, mask=place < size)
    tl.store(out + size, other, mask=place < size)


@triton.jit
def mean_squares(
    features_at,
    sample,
    first,
    size,
    channels,
    LAST: tl.constexpr,
    PLACES: tl.constexpr,
    CHANNELS: tl.constexpr,
    ALIGN: tl.constexpr,
):
    total = tl.zeros([PLACES, CHANNELS] if LAST else [CHANNELS, PLACES], tl.float32)
    for start in range(0, channels, CHANNELS):
        place, inside, _ = tile(sample, first, start, size, channels, LAST, PLACES, CHANNELS, ALIGN)
        features = tl.load(features_at + place, mask=inside, other=0.0).to(tl.float32)
        total += features * features
    return tl.sum(total, 1 if LAST else 0) / channels.to(tl.float32)


@triton.jit
def tile(
    sample,
    first,
    start,
    size,
    channels,
    LAST: tl.constexpr,
    PLACES: tl.constexpr,
    CHANNELS: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Where a sample's places from `first` and channels from `start` on lie, whether they are there, and the places.

    The tile is `[PLACES, CHANNELS]` where channels lie side by side, otherwise `[CHANNELS, PLACES]`.
    """
    # Dividing and multiplying tells the compiler of the multiple that vector loads and stores need.
    if LAST:
        channels = channels // ALIGN * ALIGN
        place = (first + tl.arange(0, PLACES))[:, None]
        channel = (start + tl.arange(0, CHANNELS))[None, :]
        at = sample * size * channels + place * channels + channel
    else:
        size = size // ALIGN * ALIGN
        place = (first + tl.arange(0, PLACES))[None, :]
        channel = (start + tl.arange(0, CHANNELS))[:, None]
        at = sample * channels * size + channel * size + place
    return at, (place < size) & (channel < channels), place


@triton.jit(do_not_specialize=["size"])
def attention_pulls(
    maps_at,  # float32 [N, 2, size]
    upstream_at,  # float32 [], or None
    pulls_at,  # float32 [N, size], or None
    losses_at,  # float32 [N]: |u - v|^2
    size: tl.int64,
    slope,
    BLOCK: tl.constexpr,
):
    """One sample's loss, and by what the gradient at each of its places differs from the student."""
    sample = tl.program_id(0).to(tl.int64)
    own_at, lanes = maps_at + 2 * sample * size, tl.arange(0, BLOCK)
    aa, bb = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        own, other = pair(own_at, start + lanes, size)
        aa += own * own
        bb += other * other
    length = tl.sum(aa, 0) + LENGTH_EPSILON
    ratio = tl.sqrt(length / (tl.sum(bb, 0) + LENGTH_EPSILON))
    squares, products = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        own, other = pair(own_at, start + lanes, size)
        apart = own - other * ratio
        squares += apart * apart
        products += own * apart
    tl.store(losses_at + sample, tl.sum(squares, 0) / length)
    if pulls_at is not None:
        along = tl.sum(products, 0) / length
        if upstream_at is not None:
            slope *= tl.load(upstream_at)
        for start in range(0, size, BLOCK):
            own, other = pair(own_at, start + lanes, size)
            pull = (own - other * ratio - own * along) / length * slope
            place = start + lanes
            tl.store(pulls_at + sample * size + place, pull, mask=place < size)


@triton.jit
def pair(own_at, place, size):
    """Both maps of a sample at some places, 0 beyond the last one."""
    own = tl.load(own_at + place, mask=place < size, other=0.0)
    return own, tl.load(own_at + size + place, mask=place < size, other=0.0)


@triton.jit(do_not_specialize=["samples", "chunks", "size", "channels"])
def attention_gradient(
    student_at,
    gradient_at,
    pulls_at,  # float32 [N, size]
    losses_at,  # float32 [N]
    upstream_at,  # float32 [], or None
    total_at,  # float32 []
    samples: tl.int64,
    chunks: tl.int64,
    size: tl.int64,
    channels: tl.int64,
    scale,
    LAST: tl.constexpr,
    PLACES: tl.constexpr,
    CHANNELS: tl.constexpr,
    ALIGN: tl.constexpr,
    ADDED: tl.constexpr,
):
    """The gradient at PLACES places and CHANNELS channels of a sample; the first program adds up the loss as well."""
    program = tl.program_id(0).to(tl.int64)
    sample = program // chunks
    first, start = (program - sample * chunks) * PLACES, tl.program_id(1).to(tl.int64) * CHANNELS
    at, inside, place = tile(sample, first, start, size, channels, LAST, PLACES, CHANNELS, ALIGN)
    student = tl.load(student_at + at, mask=inside, other=0.0).to(tl.float32)
    pull = tl.load(pulls_at + sample * size + place, mask=place < size, other=0.0)
    tl.store(gradient_at + at, (student * pull).to(gradient_at.dtype.element_ty), mask=inside)
    if tl.program_id(0) + tl.program_id(1) == 0:
        sum_partials(losses_at, upstream_at, total_at, samples, scale, ADDED)


def attention_transfer(given: Operands) -> Tensor:
    found = _aligned_maps(given, with_gradient=False)
    if found is None:
        return reference.attention_transfer(given)
    losses, _ = _losses(found, 1.0, None)
    return _triton_finish.total(losses, 1 / (found.samples * found.places), None)


def attention_transfer_with_grad(given: Operands, factor: float, upstream: Tensor | None) -> tuple[Tensor, Tensor]:
    found = _aligned_maps(given, with_gradient=True)
    if found is None:
        return reference.attention_transfer_with_grad(given, factor, upstream)
    upstream = packed(upstream, torch.float32)
    losses, pulls = _losses(found, factor, upstream)
    student, channels = found.student, found.student.shape[1]
    total = torch.empty((), dtype=torch.float32, device=student.device)
    tiling = _tiling(student)
    chunks = triton.cdiv(found.places, tiling.places)
    arguments = {"student_at": student, "gradient_at": found.gradient, "pulls_at": pulls, "losses_at": losses}
    arguments |= {"upstream_at": upstream, "total_at": total, "samples": found.samples, "chunks": chunks}
    arguments |= {"size": found.places, "channels": channels, "scale": factor / (found.samples * found.places)}
    grid = found.samples * chunks, triton.cdiv(channels, tiling.channels)
    launch(attention_gradient, grid, arguments, _of_gradient(tiling, channels_last(student)), tiling.warps)
    return total, laid_out_like(found.gradient, given.student)


def _aligned_maps(given: Operands, with_gradient: bool) -> PlainMaps | None:
    found = plain_maps(given, with_gradient)
    if found is None:
        return None
    return found._replace(student=aligned(found.student), target=aligned(found.target))


def _losses(found: PlainMaps, factor: float, upstream: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return |u - v|^2 of each sample, and each place's pull `[N, H * W]` where a gradient is wanted."""
    student, target, gradient = found
    (samples, channels), places = student.shape[:2], found.places
    single = {"dtype": torch.float32, "device": student.device}
    maps, losses = torch.empty((samples, 2, places), **single), torch.empty(samples, **single)
    pulls = None if gradient is None else torch.empty((samples, places), **single)
    tiling = _tiling(student, target)
    chunks = triton.cdiv(places, tiling.places)
    arguments = {"student_at": student, "target_at": target, "maps_at": maps, "chunks": chunks, "size": places}
    arguments |= {"student_channels": channels, "target_channels": target.shape[1]}
    constants = _of_maps(tiling, channels_last(student), channels_last(target))
    launch(attention_maps, (samples * chunks,), arguments, constants, tiling.warps)
    block = next((block for block in _PLACE_BLOCKS if block >= places), _PLACE_BLOCKS[-1])
    slope = 4 * factor / (samples * places * channels)
    arguments = {"maps_at": maps, "upstream_at": upstream, "pulls_at": pulls, "losses_at": losses}
    arguments |= {"size": places, "slope": slope}
    launch(attention_pulls, (samples,), arguments, {"BLOCK": block}, _warps_of_pulls(block))
    return losses, pulls


def _of_maps(tiling: _Tiling, student_last: bool, target_last: bool) -> dict:
    return tiling.constants | {"STUDENT_LAST": student_last, "TARGET_LAST": target_last}


def _of_gradient(tiling: _Tiling, last: bool) -> dict:
    return tiling.constants | {"LAST": last, "ADDED": _ADDED}


def _warps_of_pulls(block: int) -> int:
    return max(2, block // 256)


def specialisations() -> Iterator[Listed]:
    yield from _triton_finish.specialisations()
    yield from _listed_maps()
    yield from _listed_pulls()
    yield from _listed_gradients()


def _listed_maps() -> Iterator[Listed]:
    for student, target, *last in product(FLOATS, FLOATS, (False, True), (False, True)):
        arguments = {"student_at": student, "target_at": target, "maps_at": torch.float32, "chunks": 0, "size": 0}
        arguments |= {"student_channels": 0, "target_channels": 0}
        for channels, align in product(_CHANNEL_BLOCKS[all(last)], ALIGNMENTS):
            tiling = _Tiling(channels, align)
            listed = variant(attention_maps, arguments, _of_maps(tiling, *last), tiling.warps)
            yield Listed(attention_maps, listed, wide_loads=align > 1)


def _listed_pulls() -> Iterator[Listed]:
    single = torch.float32
    for upstream, pulls in ((None, None), (None, single), (single, single)):
        for block in _PLACE_BLOCKS:
            arguments = {"maps_at": single, "upstream_at": upstream, "pulls_at": pulls, "losses_at": single}
            listed = variant(
                attention_pulls, arguments | {"size": 0, "slope": 0.0}, {"BLOCK": block}, _warps_of_pulls(block)
            )
            yield Listed(attention_pulls, listed)


def _listed_gradients() -> Iterator[Listed]:
    single = torch.float32
    for student, upstream, last in product(FLOATS, (None, single), (False, True)):
        arguments = {"student_at": student, "gradient_at": student, "pulls_at": single, "losses_at": single}
        arguments |= {"upstream_at": upstream, "total_at": single}
        arguments |= dict.fromkeys(("samples", "chunks", "size", "channels"), 0) | {"scale": 0.0}
        for channels, align in product(_CHANNEL_BLOCKS[last], ALIGNMENTS):
            tiling = _Tiling(channels, align)
            listed = variant(attention_gradient, arguments, _of_gradient(tiling, last), tiling.warps)
            yield Listed(attention_gradient, listed, wide_loads=align > 1, wide_stores=align > 1)
