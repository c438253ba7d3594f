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
from torch import Tensor

from stablekd_fast.kernels._checks import FLOATS
from stablekd_fast.kernels._launch import ALIGNMENTS, Listed, aligned, alignment, launch, variant
from stablekd_fast.kernels._layout import laid_out_as
from stablekd_fast.kernels.batch_norm_act import reference
from stablekd_fast.kernels.batch_norm_act._triton_kernels import (
    EXTENTS,
    merge_norm_gradient_sums,
    merge_norm_moments,
    norm_apply,
    norm_gradient,
    norm_gradient_sums,
    norm_moments,
)

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
    single, extents = torch.float32, dict.fromkeys(EXTENTS[:3], 0)
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
