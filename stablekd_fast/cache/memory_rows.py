"""Rows in main or GPU memory, by row number, for one run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from stablekd_fast.cache.shard import Part
from stablekd_fast.cache.tables import has_entry, have_entries, indexable
from stablekd_fast.errors import CacheFull

_THREADS = min(8, max(1, (os.cpu_count() or 1) // 2))
"""Threads that gather rows in main memory, of each column."""
_BYTES_OF_A_THREAD = 1 << 20
"""The fewest bytes that a further thread is worth."""


class Shipped:
    """Places of rows that were brought to a device last: columns that were filled together have the same."""

    def __init__(self) -> None:
        self._places: Tensor | None = None
        self._there: Tensor | None = None

    def there(self, places: Tensor, device: torch.device) -> Tensor:
        """The places, int64 `[N]`, on `device`."""
        if self._there is None or self._places is None or not torch.equal(places, self._places):
            self._places, self._there = places, places.to(device, non_blocking=True)
        return self._there


class MemoryRows:
    """Room for `capacity` rows on `device`. Raises CacheFull if the device does not have it."""

    def __init__(self, parts: Sequence[Part], capacity: int, device: torch.device) -> None:
        self.device, self.capacity, self.used = device, capacity, 0
        try:
            self._parts = [torch.empty((capacity, *part.shape), dtype=part.dtype, device=device) for part in parts]
        except (RuntimeError, torch.OutOfMemoryError) as error:
            size = capacity * sum(part.bytes for part in parts)
            raise CacheFull(
                f"{size} bytes for {capacity} rows were refused by {device}; lower the budget of this memory."
            ) from error
        self._slots = torch.empty(0, dtype=torch.int64)
        self._threads: ThreadPoolExecutor | None = None

    def __len__(self) -> int:
        """Rows that are stored."""
        return self.used

    def present(self, rows: Tensor) -> Tensor:
        """Whether each row of `rows` int64 `[N]` is stored: bool `[N]`."""
        return has_entry(self._slots, rows)

    def complete(self, rows: Tensor) -> bool:
        """Whether all of `rows` int64 `[N]` are stored."""
        return have_entries(self._slots, rows)

    def put(self, rows: Tensor, parts: Sequence[Tensor]) -> None:
        """Store those of the rows that are not stored yet. Raises CacheFull once all that fit are stored."""
        if not len(rows):
            return
        more = int(rows.max()) + 1 - len(self._slots)
        if more > 0:
            self._slots = torch.cat([self._slots, torch.full((more,), -1)])
        fresh = (~self.present(rows)).nonzero().flatten()
        kept = fresh[: self.capacity - self.used]
        place = slice(self.used, self.used + len(kept))
        for stored, values in zip(self._parts, parts):
            indexable(stored)[place] = indexable(values)[kept.to(values.device)].to(self.device)
        self._slots[rows[kept]] = torch.arange(place.start, place.stop)
        self.used += len(kept)
        if len(kept) < len(fresh):
            raise CacheFull(f"All {self.capacity} rows that were planned for {self.device} are stored.")

    def gather(self, rows: Tensor, shipped: Shipped | None = None) -> list[Tensor]:
        """The rows with the numbers `rows` int64 `[N]`, in that order: one tensor `[N, ...]` per part, on `device`.
        `shipped` knows what was brought there for the rows of other columns."""
        slots = self._slots[rows]
        slots = slots.to(self.device, non_blocking=True) if shipped is None else shipped.there(slots, self.device)
        return [indexable(part).index_select(0, slots).view(part.dtype) for part in self._parts]

    def empty(self, count: int, *, pinned: bool = False) -> list[Tensor]:
        """Main memory for `count` rows, one tensor `[count, ...]` per part."""
        return [torch.empty((count, *part.shape[1:]), dtype=part.dtype, pin_memory=pinned) for part in self._parts]

    def submit(self, rows: Tensor, out: Sequence[Tensor]) -> list[Future[None]]:
        """Begin to gather rows, which are stored, from main memory into `out`, which is filled once `wait` returns."""
        slots = self._slots[rows]
        size = sum(part[0].nbytes for part in self._parts) if len(slots) else 0
        each = max(len(slots) // _THREADS, _BYTES_OF_A_THREAD // max(size, 1), 1)

        def gather(own: slice) -> None:
            for part, values in zip(self._parts, out):
                torch.index_select(indexable(part), 0, slots[own], out=indexable(values)[own])

        if self._threads is None:
            self._threads = ThreadPoolExecutor(_THREADS, "rows in main memory")
        return [self._threads.submit(gather, slice(at, at + each)) for at in range(0, len(slots), each)]

    def wait(self, ticket: list[Future[None]]) -> None:
        """Wait until a gathering is over."""
        for piece in ticket:
            piece.result()

    def close(self) -> None:
        """Let go of the memory."""
        if self._threads is not None:
            self._threads.shutdown()
        self._parts, self._slots = [], torch.empty(0, dtype=torch.int64)
