"""Rows of fixed size on disk, by row number, appended in any order and read in any order.

A store is one folder: `manifest.json`, finished shards `shard-00000.safetensors`, and shards that are being written,
`.shard-00001.safetensors`. Each of these has one writer, which holds a lock on it; a full one is flushed, renamed and
entered in the manifest. What a killed process leaves is taken up by the next writer, up to its last whole row.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stablekd_fast.cache.manifest import MANIFEST, Manifest
from stablekd_fast.cache.memory import listed
from stablekd_fast.cache.shard import REMEDY, SUFFIX, Shard, checksums_of, full_disk, is_locked, lock, rows_in
from stablekd_fast.errors import CacheError, CacheFull
from stablekd_fast.kernels._native import core
from stablekd_fast.kernels._native import reason as no_core

READING_THREADS = 8
_LOCK = ".lock"
_SMALLEST_SHARD, _LARGEST_SHARD = 64 << 20, 4 << 30
_SHARDS_PER_VIEW = 32
_NONE, _ABSENT, _READ, _CHECKSUM = range(4)  # `Fault` in csrc/row_store.h


@dataclass(frozen=True)
class DiskBudget:
    """At most `limit` bytes in all files under `folder`; None for as much as the disk has."""

    folder: Path
    limit: int | None = None

    @contextlib.contextmanager
    def room_for(self, more: int) -> Iterator[None]:
        """While within it, no other process takes from the budget. Raises CacheFull if `more` bytes do not fit."""
        if self.limit is None:
            yield
            return
        with _locked(self.folder):
            used = sum(path.stat().st_size for path in self.folder.rglob(f"*{SUFFIX}"))
            if used + more > self.limit:
                raise CacheFull(
                    f"The cache in {self.folder} holds {used} bytes, and {more} more would exceed its budget of "
                    f"{self.limit}. What is stored stays readable; raise --cache.disk_budget for more."
                )
            yield


@dataclass(frozen=True)
class Ticket:
    """A reading under way. Keeps what is read into, and the tables that are read by, alive."""

    number: int
    tensors: tuple[Tensor, ...]


class RowStore:
    """Rows in a folder.

    Args:
        folder: of this store; made with `write` if it is not there.
        wanted: what the rows must be. May be left out to open what is there.
        write: take up shards that a dead writer left, and allow `put`.
        budget: for all that `put` stores; that of the whole cache, one folder up.
        verify: compare checksums at every reading, not at a row's first one only.
        expected: row numbers that will be put, to size the last shard (all samples of one view by default).

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
        self.reader = core.RowReader(threads)
        self._shards: list[Shard] = []
        self._open: list[Shard] = []
        self._waiting: dict[int, Ticket] = {}
        self._mutex = threading.RLock()
        self._places = torch.empty(0, dtype=torch.int64)
        self._checksums = torch.empty(0, dtype=torch.int32)
        self._seen = torch.empty(0, dtype=torch.uint8)
        self._shard_table = torch.empty(0, dtype=torch.int64)
        with self._alone():
            self.manifest = self._load_or_create(wanted)
            self.expected = self.manifest.samples if expected is None else expected
            for name in sorted(self.manifest.shards):
                self._add(self._open_finished(name))
            if write:
                self._take_up()

    # Reading.

    def present(self, rows: Tensor) -> Tensor:
        """Whether each row of `rows` int64 `[N]` is stored: bool `[N]`."""
        return listed(self._places, rows)

    def __len__(self) -> int:
        """Rows stored."""
        return int((self._places >= 0).sum())

    def empty(self, count: int, *, pinned: bool = False) -> list[Tensor]:
        """Memory for `count` rows, one tensor `[count, ...]` per part."""
        return [torch.empty((count, *part.shape), dtype=part.dtype, pin_memory=pinned) for part in self.manifest.parts]

    def gather(self, rows: Tensor, out: Sequence[Tensor] | None = None) -> list[Tensor]:
        """The rows `rows` int64 `[N]` in that order, one tensor `[N, ...]` per part, into `out` if given.

        Raises CacheError naming shard and row for a row that is not stored, damaged or unreadable.
        """
        out = self.empty(len(rows)) if out is None else list(out)
        self.wait(self.submit(rows, out))
        return out

    def submit(self, rows: Tensor, out: Sequence[Tensor]) -> Ticket:
        """Begin to gather; `wait` for the ticket before `out` is read. Raises CacheError if `out` does not fit."""
        rows = rows.contiguous()
        self._check_parts(rows, out)
        if len(rows) and not bool(self.present(rows).all()):
            missing = int(rows[~self.present(rows)][0])
            raise CacheError(f"{self.describe(missing)} is not stored in {self.folder}; fill the cache first.")
        with self._mutex:
            tables = (self._places, self._checksums, self._seen, self._shard_table)
            parts = [(part.bytes, tensor.data_ptr()) for part, tensor in zip(self.manifest.parts, out)]
            addresses = [table.data_ptr() for table in tables]
            number = self.reader.submit(rows.data_ptr(), len(rows), *addresses, parts, self.verify_always)
            ticket = self._waiting[number] = Ticket(number, (rows, *out, *tables))
        return ticket

    def wait(self, ticket: Ticket) -> None:
        """Raises what `gather` raises."""
        fault, row, error = self.reader.wait(ticket.number)
        del self._waiting[ticket.number]
        if fault == _NONE:
            return
        shard = self._shards[int(self._places[row]) >> 32].path
        if fault == _CHECKSUM:
            raise CacheError(f"{self.describe(row)} in {shard} does not fit its checksum: it is damaged. {REMEDY}")
        why = os.strerror(error) if error else "the file ends too early"
        raise CacheError(f"{self.describe(row)} in {shard} cannot be read: {why}. {REMEDY}")

    def describe(self, row: int) -> str:
        view, sample = divmod(row, self.manifest.samples)
        return f"Row {row} (sample {sample}, view {view})"

    def refresh(self) -> None:
        """Take up what other processes have stored since: shards that they finished, and rows of those that they still
        write.

        Raises CacheError if one of them is damaged.
        """
        if not self.write:
            return
        with self._mutex, self._alone():
            self.manifest.shards = Manifest.load(self.folder).shards
            known = {shard.path.name.lstrip("."): number for number, shard in enumerate(self._shards)}
            for path in self._shard_files():
                number = known.get(path.name.lstrip("."))
                if number is not None:
                    self._reread(number, path)
                elif path.name in self.manifest.shards:
                    self._add(self._open_finished(path.name))
                elif rows := rows_in(path):
                    shard = Shard.open(path, self.manifest.parts, rows)
                    shard.used = shard.leading_rows()
                    self._add(shard)

    def verify(self) -> int:
        """Read every row and compare its checksum; how many there are. Raises CacheError at the first that is wrong."""
        for shard in self._shards:
            slot = shard.first_bad_slot(self.reader)
            if slot is not None:
                row = self.describe(int(shard.keys[slot]))
                raise CacheError(f"{row} in {shard.path} does not fit its checksum: it is damaged. {REMEDY}")
        return len(self)

    # Writing.

    def put(self, rows: Tensor, parts: Sequence[Tensor]) -> None:
        """Store the rows that are not stored yet: numbers int64 `[N]`, one CPU tensor `[N, ...]` per part.

        Raises CacheFull where budget or disk end; the rows before that are stored.
        """
        self._check_parts(rows, parts)
        with self._mutex:
            if len(rows):
                self._make_room(int(rows.max()) + 1)
            fresh = self._fresh(rows)
            if len(fresh) < len(rows):
                rows, parts = rows[fresh], [part[fresh] for part in parts]
            checksums = checksums_of(self.reader, rows, parts)
            done = 0
            while done < len(rows):
                done += self._append(rows[done:], checksums[done:], [part[done:] for part in parts])

    def _append(self, rows: Tensor, checksums: Tensor, parts: Sequence[Tensor]) -> int:
        """As many rows as fit into one shard; how many."""
        shard = self._writing(len(rows))
        first, count = shard.used, min(len(rows), shard.rows - shard.used)
        shard.append(rows[:count], checksums[:count], [part[:count] for part in parts])
        self._enter(self._shards.index(shard), shard, first)
        if shard.used == shard.rows:
            self._finish(shard)
        return count

    def close(self) -> None:
        """Wait for what is being read, and let go of all files. Shards that are not full wait for the next writer."""
        for ticket in list(self._waiting.values()):
            with contextlib.suppress(CacheError):
                self.wait(ticket)
        for shard in self._shards:
            shard.close()
        self._shards, self._open = [], []

    def __enter__(self) -> RowStore:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # Shards.

    def _load_or_create(self, wanted: Manifest | None) -> Manifest:
        if wanted is not None and not (self.folder / MANIFEST).exists():
            if not self.write:
                raise CacheError(f"There is no cache in {self.folder}; fill it first.")
            wanted.save(self.folder)
        found = Manifest.load(self.folder)
        if wanted is not None:
            found.check_same(wanted, self.folder)
        return found

    def _open_finished(self, name: str) -> Shard:
        known = self.manifest.shards[name]
        shard = Shard.open(self.folder / name, self.manifest.parts, known["rows"])
        if shard.index_digest() != known["index"]:
            slot = shard.first_bad_slot(self.reader)
            where = "its row numbers" if slot is None else f"row {int(shard.keys[slot])}, slot {slot}"
            shard.close()
            raise CacheError(f"The index of {shard.path} is not what was written there: {where} is damaged. {REMEDY}")
        shard.used = int((shard.keys >= 0).sum())
        return shard

    def _shard_files(self) -> list[Path]:
        """Those that are being written, and the finished ones."""
        return sorted([*self.folder.glob(f".shard-*{SUFFIX}"), *self.folder.glob(f"shard-*{SUFFIX}")])

    def _take_up(self) -> None:
        """Go on with the shards that dead writers left: half-filled ones, and one renamed but not entered."""
        for path in self._shard_files():
            if path.name in self.manifest.shards:
                continue
            rows = rows_in(path)
            try:
                shard = Shard.open(path, self.manifest.parts, rows, write=True) if rows else None
            except CacheError:
                shard = None
            if shard is None:
                if not is_locked(path):
                    path.unlink(missing_ok=True)  # killed before its header was whole
                continue
            if not lock(shard.file):
                shard.close()  # its writer lives
                continue
            shard.keep_whole_rows(self.reader)
            self._add(shard)
            if shard.used == shard.rows:
                self._enter_in_manifest(shard)
            else:
                self._open.append(shard)

    def _writing(self, more: int) -> Shard:
        """A shard with a free slot."""
        for shard in self._open:
            if shard.used < shard.rows:
                return shard
        rows = self._rows_of_next_shard(more)
        with self._alone(), self.budget.room_for(Shard.size_of(self.manifest.parts, rows)):
            numbers = [int(path.stem.split("-")[1]) for path in self.folder.glob(f"*shard-*{SUFFIX}")]
            path = self.folder / f".shard-{max(numbers, default=-1) + 1:05d}{SUFFIX}"
            shard = Shard.create(path, self.manifest.parts, rows)
            lock(shard.file)
        self._add(shard)
        self._open.append(shard)
        return shard

    def _rows_of_next_shard(self, more: int) -> int:
        per_view = self.manifest.samples * self.manifest.row_bytes
        size = min(max(per_view // _SHARDS_PER_VIEW, _SMALLEST_SHARD), _LARGEST_SHARD)
        missing = max(self.expected - len(self), more)
        return max(1, min(size // self.manifest.row_bytes, missing))

    def _finish(self, shard: Shard) -> None:
        try:
            os.fsync(shard.file)
        except OSError as error:
            raise full_disk(shard.path, shard.size, error) from error
        with self._alone():
            self.manifest.shards = Manifest.load(self.folder).shards
            self._enter_in_manifest(shard)
        self._open.remove(shard)

    def _enter_in_manifest(self, shard: Shard) -> None:
        """Rename first: a shard that is renamed but not entered is taken up like a half-filled one."""
        final = shard.path.with_name(shard.path.name.lstrip("."))
        os.rename(shard.path, final)
        shard.path = final
        self.manifest.shards[final.name] = {"rows": shard.rows, "index": shard.index_digest()}
        self.manifest.save(self.folder)
        fcntl.flock(shard.file, fcntl.LOCK_UN)

    def _reread(self, number: int, path: Path) -> None:
        """Rows that another process has added to a shard."""
        shard, first = self._shards[number], self._shards[number].used
        shard.path = path
        if shard in self._open or first == shard.rows:
            return
        shard.read_index()
        shard.used = shard.leading_rows()
        self._enter(number, shard, first)

    # Tables by row number.

    def _make_room(self, rows: int) -> None:
        """For row numbers below `rows`. Readings under way keep the tables that they began with."""
        more = rows - len(self._places)
        if more > 0:
            more = max(more, self.manifest.samples)
            self._places = torch.cat([self._places, torch.full((more,), -1)])
            self._checksums = torch.cat([self._checksums, torch.zeros(more, dtype=torch.int32)])
            self._seen = torch.cat([self._seen, torch.zeros(more, dtype=torch.uint8)])

    def _add(self, shard: Shard) -> None:
        self._shards.append(shard)
        self._shard_table = torch.tensor(
            [[shard.file, *(shard.starts[part.name] for part in self.manifest.parts)] for shard in self._shards]
        )
        self._enter(len(self._shards) - 1, shard, 0)

    def _enter(self, number: int, shard: Shard, first: int) -> None:
        slots = torch.arange(first, shard.used)
        keys = shard.keys[first : shard.used]
        if not len(keys):
            return
        self._make_room(int(keys.max()) + 1)
        self._checksums[keys] = shard.checksums[first : shard.used]
        self._places[keys] = (number << 32) + slots

    def _fresh(self, rows: Tensor) -> Tensor:
        """Positions of rows that are not stored, each row number once."""
        candidates = (~self.present(rows)).nonzero().flatten()
        seen: set[int] = set()
        return torch.tensor(
            [at for at in candidates.tolist() if not ((row := int(rows[at])) in seen or seen.add(row))],
            dtype=torch.int64,
        )

    def _check_parts(self, rows: Tensor, parts: Sequence[Tensor]) -> None:
        found = [(tuple(part.shape), part.dtype, part.device.type, part.is_contiguous()) for part in parts]
        needed = [((len(rows), *part.shape), part.dtype, "cpu", True) for part in self.manifest.parts]
        if found != needed:
            raise CacheError(
                f"Rows of {self.folder} have the parts {needed} (shape, dtype, device, contiguous); got {found}."
            )

    def _alone(self) -> contextlib.AbstractContextManager:
        """While within it no other writer changes the folder."""
        return _locked(self.folder) if self.write else contextlib.nullcontext()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / _LOCK, "w")
    except OSError as error:
        raise full_disk(folder, 0, error) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
