"""The teacher behind a cache: rows where they are stored, one live pass where they are not."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from stablekd_fast.blocks import PairedBlocks
from stablekd_fast.cache.columns import Column
from stablekd_fast.cache.memory_rows import Gatherer, Gathering, MemoryRows, Shipped
from stablekd_fast.cache.staging import Staging
from stablekd_fast.cache.store import RowStore, Ticket
from stablekd_fast.cache.writer import RowWriter, store_now
from stablekd_fast.data import Batch
from stablekd_fast.errors import CacheFull
from stablekd_fast.teacher.live import LiveTeacher


@dataclass
class _Reading:
    """Rows of one batch that are being read ahead into memory of their own: those on disk by output, those in main
    memory together."""

    batch: Batch
    staging: Staging
    tickets: dict[int, Ticket]
    gathering: Gathering | None


class CachedTeacher:
    """Serves stored outputs; runs the live teacher for the others, and stores what the plan keeps.

    A step sees what a stored row decodes to even on the pass that stores it, and where there was no room to store it:
    the state of the cache never changes a number.
    """

    def __init__(
        self,
        paired: PairedBlocks,
        columns: dict[int, Column],
        samples: int,
        device: torch.device,
        live: LiveTeacher | None = None,
    ) -> None:
        self.columns, self.samples, self.device = columns, samples, device
        self.live = live or LiveTeacher(paired)
        self.pinned = device.type == "cuda"
        self.live_batches = 0
        self._fills: Collection[int] = columns.keys()
        self._reading: _Reading | None = None
        self._gatherer: Gatherer | None = None
        self._shipped = Shipped()
        self._writer = RowWriter(device)

    def row_numbers(self, sample_ids: Tensor, view: int | None) -> Tensor:
        """Return the numbers of the rows of these samples, int64 `[N]`, in a view, which must have a name."""
        assert view is not None, "columns are opened for views that have names"
        return view * self.samples + sample_ids

    def ahead(self, batches: Iterable[Batch], wanted: Collection[int]) -> Iterator[Batch]:
        """While a batch is in use, the rows of the next one are read."""
        following: _Reading | None = None
        for batch in batches:
            current, following = following, self._begin(batch, wanted)
            if current is not None:
                self._reading = current
                yield current.batch
        if following is not None:
            self._reading = following
            yield following.batch

    def needs_images(self, wanted: Collection[int], sample_ids: Tensor, view: int) -> bool:
        rows = self.row_numbers(sample_ids, view)
        return not all(k in self.columns and self._complete(k, rows) for k in wanted)

    def outputs(self, wanted: Collection[int], images: Tensor | None, batch: Batch) -> dict[int, Tensor]:
        """The wanted outputs for `batch`, whose images on the device are `images`."""
        reading, self._reading = self._reading, None
        if reading is None or reading.batch is not batch:
            reading = self._begin(batch, wanted)
        rows, found, arrived = self.row_numbers(batch.sample_ids, batch.view), {}, self._arrived(reading)
        for k in wanted:
            if k in arrived:
                found[k] = self.columns[k].format.decode(arrived[k])
            elif k in self.columns and self._complete(k, rows):
                found[k] = self._stored(k, rows)
        missing = set(wanted) - found.keys()
        if missing:
            self.live_batches += 1
            known = {k: value for k, value in found.items() if self.columns[k].continues}
            assert images is not None, "needs_images asked for them"
            found |= self._kept(rows, self.live.outputs(images, missing, known))
        return found

    def fill(self, stored: Collection[int]) -> None:
        """Several processes fill columns on disk together; in memory each has rows of its own."""
        self._writer.settle()
        self._fills = {k for k, column in self.columns.items() if k in stored or not column.on_disk}
        for column in self.columns.values():
            if isinstance(column.rows, RowStore):
                column.rows.refresh()

    def settle(self) -> None:
        self._writer.settle()

    def seal(self) -> None:
        """Finish the files of the columns, once the run has stored what it keeps; a disk that refuses costs a line."""
        self._writer.settle()
        for column in self.columns.values():
            if isinstance(column.rows, RowStore) and column.rows.write:
                try:
                    column.rows.seal()
                except CacheFull as error:
                    warnings.warn(f"{column.name} stays unfinished: {error}", RuntimeWarning, stacklevel=2)

    def report(self) -> dict:
        """For how many batches some teacher block ran, and how many rows each column holds."""
        self._writer.settle()
        return {"live_batches": self.live_batches, "rows": {c.name: len(c.rows) for c in self.columns.values()}}

    def close(self) -> None:
        try:
            self._writer.close()
        finally:
            self.live.close()
            if self._gatherer is not None:
                self._gatherer.close()
            for column in self.columns.values():
                column.rows.close()

    def _begin(self, batch: Batch, wanted: Collection[int]) -> _Reading:
        rows, read = self.row_numbers(batch.sample_ids, batch.view), []
        for k in wanted:
            if k in self.columns and self._lies_apart(self.columns[k].rows) and self._complete(k, rows):
                read.append(k)
        staging = Staging({k: self.columns[k].format.parts for k in read}, len(rows), pinned=self.pinned and bool(read))
        tickets, in_memory = {}, []
        for k in read:
            store = self.columns[k].rows
            if isinstance(store, RowStore):
                tickets[k] = store.submit(rows, staging.parts[k])
            else:
                in_memory.append((store, rows, staging.parts[k]))
        return _Reading(batch, staging, tickets, self._gather(in_memory))

    def _gather(self, wanted: list[tuple[MemoryRows, Tensor, list[Tensor]]]) -> Gathering | None:
        if not wanted:
            return None
        self._gatherer = self._gatherer or Gatherer()
        return self._gatherer.submit(wanted)

    def _arrived(self, reading: _Reading) -> dict[int, list[Tensor]]:
        """What was read ahead, on the device: by output the parts of its rows."""
        for k, ticket in reading.tickets.items():
            store = self.columns[k].rows
            assert isinstance(store, RowStore)
            store.wait(ticket)
        if reading.gathering is not None and self._gatherer is not None:
            self._gatherer.wait(reading.gathering)
        return reading.staging.on(self.device) if reading.staging.parts else {}

    def _lies_apart(self, store: RowStore | MemoryRows) -> bool:
        """Whether rows lie elsewhere than what trains: those on disk, and those in main memory beside a GPU. They are
        read into memory of their own before they are wanted, and stored by a thread."""
        return isinstance(store, RowStore) or (self.pinned and store.device.type == "cpu")

    def _complete(self, k: int, rows: Tensor) -> bool:
        """Whether all rows of an output are stored, those among them that are handed over to be stored."""
        store = self.columns[k].rows
        return store.complete(rows) or (self._writer.await_rows(rows) and store.complete(rows))

    def _stored(self, k: int, rows: Tensor) -> Tensor:
        """Rows of an output that were not read ahead."""
        column = self.columns[k]
        if isinstance(column.rows, MemoryRows):
            parts = column.rows.gather(rows, self._shipped)
        else:
            parts = column.rows.gather(rows)
        return column.format.decode([part.to(self.device, non_blocking=True) for part in parts])

    def _kept(self, rows: Tensor, outputs: dict[int, Tensor]) -> dict[int, Tensor]:
        """What the live teacher gave, as its rows will give it; those are stored that the plan keeps."""
        found, apart = dict(outputs), []
        for k in [k for k in outputs if k in self.columns]:
            column = self.columns[k]
            parts = column.format.encode(outputs[k])
            found[k] = column.format.decode(parts)
            if column.closed or k not in self._fills:
                continue
            if self._lies_apart(column.rows):
                apart.append((column, parts))
            else:
                store_now(column, rows, parts)
        if apart:
            self._writer.put(rows, apart)
        return found
