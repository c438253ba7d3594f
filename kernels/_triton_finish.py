"""The last step of a Triton loss: the sum of what its programs left behind, in an order that never changes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from stablekd_fast.kernels._launch import Listed, launch, variant

_BLOCK = 1024
_WARPS = 4


@triton.jit(do_not_specialize=["count"])
def sum_partials(
    partials_at,  # float32 [count]
    upstream_at,  # float32 [] or None
    total_at,  # float32 []
    count: tl.int64,
    scale,
    BLOCK: tl.constexpr,
):
    lanes = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        lanes += tl.load(partials_at + place, mask=place < count, other=0.0)
    total = tl.sum(lanes, 0) * scale
    if upstream_at is not None:
        total *= tl.load(upstream_at)
    tl.store(total_at, total)


def total(partials: Tensor, scale: float, upstream: Tensor | None) -> Tensor:
    """`scale` times `upstream` times the sum of the float32 `partials`; 0-dim, float32."""
    out = torch.empty((), dtype=torch.float32, device=partials.device)
    arguments = _arguments(partials, upstream, out, partials.numel(), scale)
    launch(sum_partials, (1,), arguments, {"BLOCK": _BLOCK}, _WARPS)
    return out


def specialisations() -> Iterator[Listed]:
    for upstream in (None, torch.float32):
        arguments = _arguments(torch.float32, upstream, torch.float32, 0, 0.0)
        yield Listed(sum_partials, variant(sum_partials, arguments, {"BLOCK": _BLOCK}, _WARPS))


def _arguments(partials, upstream, out, count: int, scale: float) -> dict:
    return {"partials_at": partials, "upstream_at": upstream, "total_at": out, "count": count, "scale": scale}
