"""Rows in main or GPU memory, by row number, for one run."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from stablekd_fast.cache.shard import Part
from stablekd_fast.cache.tables import has_entry, indexable
from stablekd_fast.errors import CacheFull


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
        self._thread: ThreadPoolExecutor | None = None

    def __len__(self) -> int:
        """Rows that are stored."""
        return self.used

    def present(self, rows: Tensor) -> Tensor:
        """Whether each row of `rows` int64 `[N]` is stored: bool `[N]`."""
        return has_entry(self._slots, rows)

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

    def gather(self, rows: Tensor) -> list[Tensor]:
        """The rows with the numbers `rows` int64 `[N]`, in that order: one tensor `[N, ...]` per part, on `device`."""
        slots = self._slots[rows].to(self.device, non_blocking=True)
        return [indexable(part).index_select(0, slots).view(part.dtype) for part in self._parts]

    def empty(self, count: int, *, pinned: bool = False) -> list[Tensor]:
        """Main memory for `count` rows, one tensor `[count, ...]` per part."""
        return [torch.empty((count, *part.shape[1:]), dtype=part.dtype, pin_memory=pinned) for part in self._parts]

    def submit(self, rows: Tensor, out: Sequence[Tensor]) -> Future[None]:
        """Begin to gather rows, which are stored, from main memory into `out`, which is filled once `wait` returns."""
        slots = self._slots[rows]

        def gather() -> None:
            for part, values in zip(self._parts, out):
                torch.index_select(indexable(part), 0, slots, out=indexable(values))

        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "rows in main memory")
        return self._thread.submit(gather)

    def wait(self, ticket: Future[None]) -> None:
        """Wait until a gathering is over."""
        ticket.result()

    def close(self) -> None:
        """Let go of the memory."""
        if self._thread is not None:
            self._thread.shutdown()
        self._parts, self._slots = [], torch.empty(0, dtype=torch.int64)
