"""Rows of fixed size on disk, by row number, appended in any order and read in any order.

A store is one folder: `manifest.json`, finished shards `shard-00000.safetensors`, and shards that are being written,
`.shard-00001.safetensors`. Each of these has one writer, which holds a lock on it; a full one is flushed, renamed and
entered in the manifest, and so is one that is not full when its run ends. What a killed process leaves is taken up by
the next writer, up to its last whole row. docs/cache-and-views.md has all states and who may change them.
"""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stablekd_fast.cache.disk import (
    DiskBudget,
    flush_folder,
    full_disk,
    hold,
    locked,
    next_shard,
    shards_in,
    unlock,
)
from stablekd_fast.cache.manifest import MANIFEST, Manifest
from stablekd_fast.cache.shard import REMEDY, Shard, checksums_of
from stablekd_fast.cache.tables import RowTables, indexable
from stablekd_fast.errors import CacheError, CacheMissing
from stablekd_fast.files.owned import try_lock
from stablekd_fast.kernels._native import core
from stablekd_fast.kernels._native import reason as no_core

READING_THREADS = 8
_SMALLEST_SHARD, _LARGEST_SHARD = 64 << 20, 4 << 30
_SHARDS_PER_VIEW = 32
_NONE, _ABSENT, _READ, _CHECKSUM = range(4)  # `Fault` in csrc/row_store.h


@dataclass(frozen=True)
class Ticket:
    """A reading under way. It keeps alive what is read into, and the tables by which rows are found."""

    number: int
    tensors: tuple[Tensor, ...]


class RowStore:
    """Rows in a folder.

    Args:
        folder: the store's own folder; made with `write` if it is missing.
        wanted: what the rows must be; None opens whatever is there.
        write: take up shards that a dead writer left, and allow `put`.
        budget: the most bytes in all stores of the cache, whose folders lie beside this one.
        verify: compare checksums at every reading, not at a row's first one only.
        expected: how many rows will be put, to size the last shard (all samples of one view by default).
        threads: how many threads read.

    Raises CacheError if what is there is damaged or is not what is wanted.
    """

    def __init__(
        self,
        folder: Path,
        wanted: Manifest | None = None,
        *,
        write: bool = False,
        budget: int | None = None,
        verify: bool = False,
        expected: int | None = None,
        threads: int = READING_THREADS,
    ) -> None:
        if core is None:
            raise CacheError(f"The cache needs the C++ core, but {no_core}.")
        self.folder, self.write, self.verify_always = Path(folder), write, verify
        self.budget = DiskBudget(self.folder.parent, budget)
        try:
            self.reader = core.RowReader(threads)
        except RuntimeError as error:  # a thread was refused
            raise CacheError(str(error)) from error
        self._shards: list[Shard] = []
        self._open: list[Shard] = []
        self._waiting: dict[int, Ticket] = {}
        self._mutex = threading.RLock()
        self._held = self._hold(wanted)
        try:
            with self._alone():
                self.manifest = self._load_or_create(wanted)
                self.column = self.manifest.column
                self.tables = RowTables(self.manifest.parts, growth=self.manifest.samples)
                self.expected = self.manifest.samples if expected is None else expected
                for name in sorted(self.manifest.shards):
                    self._add_finished(name)
                self._add_unfinished()
        except BaseException:
            self.close()
            raise

    # Reading.

    def present(self, rows: Tensor) -> Tensor:
        """Whether each row of `rows` int64 `[N]` is stored: bool `[N]`."""
        return self.tables.present(rows)

    def complete(self, rows: Tensor) -> bool:
        """Whether all of `rows` int64 `[N]` are stored."""
        return self.tables.complete(rows)

    def __len__(self) -> int:
        """Rows that are stored."""
        return len(self.tables)

    def empty(self, count: int, *, pinned: bool = False) -> list[Tensor]:
        """Memory for `count` rows, one tensor `[count, ...]` per part."""
        return [torch.empty((count, *part.shape), dtype=part.dtype, pin_memory=pinned) for part in self.manifest.parts]

    def gather(self, rows: Tensor, out: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Read the rows with the numbers `rows` int64 `[N]`, in that order: one tensor `[N, ...]` per part, in `out`
        if given.

        Raises CacheError naming shard and row for a row that is not stored, damaged or unreadable.
        """
        out = self.empty(len(rows)) if out is None else list(out)
        self.wait(self.submit(rows, out))
        return out

    def submit(self, rows: Tensor, out: Sequence[Tensor]) -> Ticket:
        """Begin to read rows into `out`, which is filled once `wait` returns.

        Raises CacheError if a row is not stored, or if `out` does not fit.
        """
        rows = rows.contiguous()
        self.manifest.check_parts(len(rows), out, self.folder)
        if not self.complete(rows):
            missing = int(rows[~self.present(rows)][0])
            raise CacheError(f"{self.describe(missing)} is not stored in {self.folder}; fill the cache first.")
        with self._mutex:
            tables = self.tables.current()
            parts = [(part.bytes, tensor.data_ptr()) for part, tensor in zip(self.manifest.parts, out)]
            addresses = [table.data_ptr() for table in tables]
            number = self.reader.submit(rows.data_ptr(), len(rows), *addresses, parts, self.verify_always)
            ticket = self._waiting[number] = Ticket(number, (rows, *out, *tables))
        return ticket

    def wait(self, ticket: Ticket) -> None:
        """Wait until a reading is over. Raises CacheError as `gather` does."""
        fault, row, error = self.reader.wait(ticket.number)
        del self._waiting[ticket.number]
        if fault == _NONE:
            return
        shard = self._shards[self.tables.shard_of(row)].path
        if fault == _CHECKSUM:
            raise CacheError(f"{self.describe(row)} in {shard} does not fit its checksum: it is damaged. {REMEDY}")
        why = os.strerror(error) if error else "the file ends too early"
        raise CacheError(f"{self.describe(row)} in {shard} cannot be read: {why}. {REMEDY}")

    def describe(self, row: int) -> str:
        """The row in words, for messages."""
        view, sample = divmod(row, self.manifest.samples)
        return f"Row {row} (sample {sample}, view {view})"

    def refresh(self) -> None:
        """Enter what other processes have stored since, in shards that they have finished or still write.

        Raises CacheError if a shard is damaged.
        """
        if not self.write:
            return
        with self._mutex, self._alone():
            self.manifest.shards = Manifest.load(self.folder).shards
            known = {shard.path.name.lstrip("."): number for number, shard in enumerate(self._shards)}
            for path in shards_in(self.folder):
                number = known.get(path.name.lstrip("."))
                if number is not None:
                    self._reread(number, path)
                elif path.name in self.manifest.shards:
                    self._add_finished(path.name)
                elif (shard := self._unfinished(path, write=False)) is not None:
                    self._add(shard)

    def verify(self) -> int:
        """Read every row that was not read when its shard was opened, as those of half-filled ones are, and compare its
        checksum. Returns how many rows there are, raises CacheError at the first that is damaged."""
        for shard in self._shards:
            slot = None if shard.was_read else shard.first_bad_slot(self.reader)
            if slot is not None:
                row = self.describe(int(shard.keys[slot]))
                raise CacheError(f"{row} in {shard.path} does not fit its checksum: it is damaged. {REMEDY}")
        return len(self)

    def cut_off(self) -> list[str]:
        """Messages on half-filled shards that hold more than is used of them: a row that is not whole, and those
        behind it, which the next run makes anew."""
        return [
            f"{shard.path}: the row in slot {shard.used} is not whole, and the rows behind it are not used; the next "
            "run makes them anew."
            for shard in self._shards
            if shard.used < shard.leading_rows()
        ]

    # Writing.

    def put(self, rows: Tensor, parts: Sequence[Tensor]) -> None:
        """Store those of the rows that are not stored yet: numbers int64 `[N]`, one CPU tensor `[N, ...]` per part.

        Raises CacheFull where the budget or the disk is used up; the rows before that are stored.
        """
        self.manifest.check_parts(len(rows), parts, self.folder)
        with self._mutex:
            if len(rows):
                self.tables.make_room(int(rows.max()) + 1)
            fresh = self.tables.fresh(rows)
            if len(fresh) < len(rows):
                rows, parts = rows[fresh], [indexable(part)[fresh].view(part.dtype) for part in parts]
            checksums = checksums_of(self.reader, rows, parts)
            done = 0
            while done < len(rows):
                done += self._append(rows[done:], checksums[done:], [part[done:] for part in parts])

    def _append(self, rows: Tensor, checksums: Tensor, parts: Sequence[Tensor]) -> int:
        """Write as many of the rows as fit into one shard. Returns how many those are."""
        shard = self._writing(len(rows))
        first, count = shard.used, min(len(rows), shard.rows - shard.used)
        shard.append(rows[:count], checksums[:count], [part[:count] for part in parts])
        self.tables.enter(self._shards.index(shard), shard, first)
        if shard.used == shard.rows:
            self._finish(shard)
        return count

    def seal(self) -> None:
        """Finish the shards that are not full, for a run that is complete: readers need no writer to find their rows.
        Those without any row are removed.

        Raises CacheFull if the disk refuses; the rows stay as they are.
        """
        with self._mutex:
            for shard in list(self._open):
                if shard.used:
                    self._finish(shard)
                else:
                    shard.path.unlink(missing_ok=True)
                    self._open.remove(shard)

    def close(self) -> None:
        """Wait for the readings under way, then close all files. Shards that are not full wait for the next writer."""
        for ticket in list(self._waiting.values()):
            with contextlib.suppress(CacheError):
                self.wait(ticket)
        for shard in self._shards:
            shard.close()
        self._shards, self._open = [], []
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def __enter__(self) -> RowStore:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # Shards.

    def _hold(self, wanted: Manifest | None) -> int | None:
        """Keep the folder from being deleted; with `write` it is made if it is missing."""
        while True:
            try:
                if self.write and wanted is not None:
                    self.folder.mkdir(parents=True, exist_ok=True)
                return hold(self.folder)
            except FileNotFoundError:  # not made yet, or deleted meanwhile
                if not self.write or wanted is None:
                    raise CacheMissing(f"There is no cache in {self.folder}; fill it first.") from None
            except OSError as error:
                if isinstance(error, FileExistsError) and not os.path.lexists(self.folder):
                    continue  # deleted while it was looked at
                raise full_disk(self.folder, 0, error) from error

    def _load_or_create(self, wanted: Manifest | None) -> Manifest:
        if wanted is not None and not (self.folder / MANIFEST).exists():
            if not self.write:
                raise CacheMissing(f"There is no cache in {self.folder}; fill it first.")
            wanted.save(self.folder)
        found = Manifest.load(self.folder)
        if wanted is not None:
            found.check_same(wanted, self.folder)
        return found

    def _add_unfinished(self) -> None:
        """Add the rows of shards that are half filled, or renamed but not in the manifest yet; with `write` become the
        writer of those that have none."""
        for path in shards_in(self.folder):
            if path.name in self.manifest.shards:
                continue
            shard = self._unfinished(path, write=self.write)
            if shard is None:
                continue
            self._add(shard)
            if self.write and shard.used == shard.rows:
                self._enter_in_manifest(shard)
            elif self.write:
                self._open.append(shard)

    def _unfinished(self, path: Path, *, write: bool) -> Shard | None:
        """An open shard; None, with a word, for a file that is no shard of this column."""
        try:
            return Shard.open_unfinished(path, self.manifest.parts, self.column, self.reader, write=write)
        except (CacheError, OSError) as error:
            final = path.with_name(path.name.lstrip("."))
            if not path.exists():  # its writer has finished it meanwhile
                return self._unfinished(final, write=write) if final.exists() else None
            said = str(error).removesuffix(REMEDY)
            warnings.warn(
                f"A file is not used, and left as it is: {said}Delete it if nothing needs it.",
                RuntimeWarning,
                stacklevel=2,
            )
            return None

    def _writing(self, more: int) -> Shard:
        """A shard with a free slot; if there is none, a new one, sized for `more` rows or for all that are expected."""
        for shard in self._open:
            if shard.used < shard.rows:
                return shard
        rows = self._rows_of_next_shard(more)
        with self._alone(), self.budget.room_for(Shard.size_of(self.manifest.parts, rows)):
            shard = Shard.create(next_shard(self.folder), self.manifest.parts, rows, self.column)
            try_lock(shard.file)
        self._add(shard)
        self._open.append(shard)
        return shard

    def _rows_of_next_shard(self, more: int) -> int:
        per_view = self.manifest.samples * self.manifest.row_bytes
        size = min(max(per_view // _SHARDS_PER_VIEW, _SMALLEST_SHARD), _LARGEST_SHARD)
        missing = max(self.expected - len(self), more)
        return max(1, min(size // self.manifest.row_bytes, missing))

    def _finish(self, shard: Shard) -> None:
        with self._alone():
            self.manifest.shards = Manifest.load(self.folder).shards
            self._enter_in_manifest(shard)
        self._open.remove(shard)

    def _enter_in_manifest(self, shard: Shard) -> None:
        """Flush and rename a shard, then enter it: one that is renamed only is taken up like a half-filled one."""
        final = shard.path.with_name(shard.path.name.lstrip("."))
        try:
            if shard.used < shard.rows:
                shard.free_the_rest()
            os.fsync(shard.file)
            os.rename(shard.path, final)
            flush_folder(self.folder)  # a manifest never names a file that a power loss may take back
        except OSError as error:
            raise full_disk(final, 0, error) from error
        shard.path = final
        entry = {"rows": shard.rows, "used": shard.used, "index": shard.index_digest()}
        self.manifest.shards[final.name] = entry
        self.manifest.save(self.folder)
        unlock(shard.file)

    def _reread(self, number: int, path: Path) -> None:
        """Enter the rows that another process has added to a shard, which it may have renamed to `path`."""
        shard, first = self._shards[number], self._shards[number].used
        shard.path = path
        if shard in self._open or first == shard.rows:
            return
        shard.read_index()
        shard.used = shard.leading_rows()
        self.tables.enter(number, shard, first)

    def _add(self, shard: Shard) -> None:
        self._shards.append(shard)
        self.tables.add_shard(shard)

    def _add_finished(self, name: str) -> None:
        known = self.manifest.shards[name]
        path = self.folder / name
        parts, reader = self.manifest.parts, self.reader
        self._add(Shard.open_finished(path, parts, known["rows"], self.column, known["index"], reader))

    def _alone(self) -> contextlib.AbstractContextManager:
        """A context in which no other writer changes the folder."""
        return locked(self.folder) if self.write else contextlib.nullcontext()
