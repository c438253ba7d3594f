"""Rows in main or GPU memory, by row number, for one run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stablekd_fast.cache.shard import Part
from stablekd_fast.cache.tables import has_entry, have_entries, indexable
from stablekd_fast.errors import CacheError, CacheFull
from stablekd_fast.kernels._native import core

_THREADS = min(8, max(1, (os.cpu_count() or 1) // 2))
"""Threads that gather rows in main memory."""


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

    def lying(self, rows: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Where rows lie: their slots, int64 `[N]`, negative for one that is not stored, in each part's memory
        `[capacity, ...]`. Raises IndexError for a row number beyond all that are stored."""
        return self._slots[rows], self._parts

    def close(self) -> None:
        """Let go of the memory."""
        self._parts, self._slots = [], torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class Gathering:
    """A gathering under way. It keeps alive what is read and what is written."""

    number: int | None
    tensors: tuple[Tensor, ...]


class Gatherer:
    """Threads that gather rows in main memory, those of all columns of a batch at once. Without the C++ core they are
    gathered at once, by torch."""

    def __init__(self) -> None:
        self._reader = None if core is None else core.RowReader(_THREADS)
        self._waiting: dict[int, Gathering] = {}

    def submit(self, wanted: Sequence[tuple[MemoryRows, Tensor, Sequence[Tensor]]]) -> Gathering:
        """Begin to gather, for each column, its rows with the numbers int64 `[N]`, as many of each, into tensors
        `[N, ...]`, one per part, contiguous, which are filled once `wait` returns."""
        numbers, alive = [], []
        for store, rows, out in wanted:
            slots, parts = store.lying(rows)
            for part, values in zip(parts, out, strict=True):
                _check_fits(part, len(rows), values)
                if self._reader is None:
                    torch.index_select(indexable(part), 0, slots, out=indexable(values))
                    continue
                size = part.stride(0) * part.itemsize
                numbers.append((part.data_ptr(), size, size, slots.data_ptr(), values.data_ptr()))
                alive += [part, slots, values]
        if self._reader is None:
            return Gathering(None, ())
        number = self._reader.gather(len(wanted[0][1]) if wanted else 0, numbers)
        gathering = self._waiting[number] = Gathering(number, tuple(alive))
        return gathering

    def wait(self, gathering: Gathering) -> None:
        """Wait until a gathering is over. Raises CacheError if a row is not stored."""
        if self._reader is None or gathering.number is None:
            return
        fault, place, _ = self._reader.wait(gathering.number)
        del self._waiting[gathering.number]
        if fault:
            raise CacheError(f"Row {place} of a batch is not stored in main memory; ask for rows that are complete.")

    def close(self) -> None:
        """Wait for the gatherings under way."""
        for gathering in list(self._waiting.values()):
            with contextlib.suppress(CacheError):
                self.wait(gathering)


def _check_fits(part: Tensor, count: int, out: Tensor) -> None:
    if out.shape != (count, *part.shape[1:]) or out.dtype != part.dtype or not out.is_contiguous():
        raise CacheError(
            f"{count} rows of {tuple(part.shape[1:])} in {part.dtype} were to be gathered into {tuple(out.shape)} in "
            f"{out.dtype}; give contiguous room for as many rows of the same kind."
        )
