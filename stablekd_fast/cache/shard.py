"""One file of rows: a safetensors file whose row count is fixed when it is opened.

    bytes 0..4095      header: 8 bytes of length, JSON that names the column, spaces
    from byte 4096     one tensor `[rows, ...]` per part of a row, then
                       `keys` int64 `[rows]`: row numbers, -1 where nothing was written, and
                       `checksums` int32 `[rows]`: CRC-32C of row number (8 bytes, little endian) and parts

Rows are appended: parts first, then the checksum, then the key. A process killed at any moment leaves whole rows, and
at most one batch of slots whose keys are still -1 or whose checksums do not fit.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from stablekd_fast.cache.disk import full_disk, is_locked
from stablekd_fast.errors import CacheError, first_line
from stablekd_fast.files.owned import try_lock
from stablekd_fast.files.reading import open_regular
from stablekd_fast.files.sealed import as_bytes

FORMAT = 2
DATA_START = 4096
KEYS, CHECKSUMS = "keys", "checksums"
MOST_ROWS = 1 << 40
"""More rows than that no cache holds; whoever says so is not believed."""
_VERIFIED_AT_ONCE = 16 << 20

_DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.uint8: "U8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
}
_BY_NAME = {name: dtype for dtype, name in _DTYPES.items()}


@dataclass(frozen=True)
class Part:
    """One of the tensors of which a row consists, such as codes, or their scales; `shape` is that of one row."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape) * self.dtype.itemsize

    def plain(self) -> dict:
        """The part as JSON types."""
        return {"name": self.name, "dtype": _DTYPES[self.dtype], "shape": list(self.shape)}

    @staticmethod
    def from_plain(values: dict) -> Part:
        """The part that `plain` described. Raises ValueError, LookupError or TypeError for what no part can be."""
        part = Part(str(values["name"]), _BY_NAME[values["dtype"]], tuple(values["shape"]))
        if not all(type(size) is int and 0 < size <= MOST_ROWS for size in part.shape) or part.bytes > MOST_ROWS:
            raise ValueError(f"a part has the shape {values['shape']}")
        if part.name in (KEYS, CHECKSUMS) or not part.name.isidentifier():
            raise ValueError(f"a part is called {part.name!r}")
        return part


_KEYS, _CHECKSUMS = Part(KEYS, torch.int64, ()), Part(CHECKSUMS, torch.int32, ())


class RowReader(Protocol):
    """What a shard asks of the C++ core's `RowReader`."""

    def checksum(self, rows: int, count: int, parts: Sequence[tuple[int, int]], out: int, /) -> None:
        """Write the checksums of `count` rows to the address `out`; `parts` are (bytes of a row, address)."""


class Shard:
    """An open shard with room for `rows` rows, of which `used` are written.

    `keys` and `checksums` are what the file holds of them. `path` may change by renaming; the file stays open. `column`
    is the digest of what the rows are: a shard of another column is never opened in its place.
    """

    def __init__(self, path: Path, file: int, parts: Sequence[Part], rows: int, column: str) -> None:
        self.path, self.file, self.parts, self.rows = path, file, tuple(parts), rows
        self.header, self.starts, self.size = _header(self.parts, rows, column)
        self.keys = torch.full((rows,), -1, dtype=torch.int64)
        self.checksums = torch.zeros(rows, dtype=torch.int32)
        self.used = 0
        self.was_read = False
        """Whether all rows that it holds were read and compared."""
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)  # reading ahead would fetch rows that nobody asked for

    @staticmethod
    def create(path: Path, parts: Sequence[Part], rows: int, column: str) -> Shard:
        """Make a file with room for `rows` rows, and take all of it from the disk now.

        Raises CacheFull, and leaves no file, if the disk refuses.
        """
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise full_disk(path, 0, error) from error
        shard = Shard(path, file, parts, rows, column)
        try:
            os.posix_fallocate(file, 0, shard.size)
            _write(file, 0, shard.header)
            _write(file, shard.starts[KEYS], shard.keys)
        except OSError as error:
            path.unlink()
            shard.close()
            raise full_disk(path, shard.size, error) from error
        return shard

    @staticmethod
    def open(path: Path, parts: Sequence[Part], rows: int, column: str, *, write: bool = False) -> Shard:
        """Open a file and read its keys and checksums.

        Raises CacheError if the file is missing, has another size than it should, or has another header.
        """
        try:
            file = os.open(path, (os.O_RDWR | os.O_NOFOLLOW if write else os.O_RDONLY) | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise CacheError(f"The shard {path} cannot be opened ({error.strerror}). {REMEDY}") from error
        try:
            header, _, size = _header(parts, rows, column)
            _check_header(path, file, header, size)
        except CacheError:
            os.close(file)
            raise
        shard = Shard(path, file, parts, rows, column)
        try:
            shard.read_index()
        except CacheError:
            shard.close()
            raise
        return shard

    @staticmethod
    def open_finished(
        path: Path, parts: Sequence[Part], rows: int, column: str, digest: str, reader: RowReader
    ) -> Shard:
        """Open a file that is not written any more.

        Raises CacheError as `open` does, and where `digest` is not that of the file's keys and checksums.
        """
        shard = Shard.open(path, parts, rows, column)
        if shard.index_digest() != digest:
            slot = shard.first_bad_slot(reader)
            where = "its row numbers" if slot is None else f"row {int(shard.keys[slot])}, slot {slot}"
            shard.close()
            raise CacheError(f"The index of {path} is not what was written there: {where} is damaged. {REMEDY}")
        shard.used = int((shard.keys >= 0).sum())
        return shard

    @staticmethod
    def open_unfinished(
        path: Path, parts: Sequence[Part], column: str, reader: RowReader, *, write: bool
    ) -> Shard | None:
        """Open a file that is being written, or that a dead writer left, up to its last whole row; with `write` become
        its writer.

        None if the writer lives, which matters with `write` alone, or if it died before the header was there: then the
        file is deleted with `write`. Raises CacheError for rows of another column, and for what cannot be read.
        """
        if nothing_written(path):
            if write and not is_locked(path):
                path.unlink(missing_ok=True)
            return None
        shard = Shard.open(path, parts, rows_in(path), column, write=write)
        if write and not try_lock(shard.file):
            shard.close()
            return None
        try:
            shard.use_whole_rows(reader)
            if write:
                shard.free_the_rest()
        except BaseException:
            shard.close()
            raise
        return shard

    @staticmethod
    def size_of(parts: Sequence[Part], rows: int) -> int:
        """Bytes of a file with room for `rows` rows."""
        return _header(parts, rows, "")[2]

    def read_index(self) -> None:
        """Read keys and checksums as the file has them now."""
        for tensor, name in ((self.keys, KEYS), (self.checksums, CHECKSUMS)):
            _read(self.file, self.starts[name], tensor, self.path)
        self.was_read = False

    def leading_rows(self) -> int:
        """How many rows lie before the first free slot."""
        free = (self.keys < 0).nonzero()
        return int(free[0]) if len(free) else self.rows

    def append(self, keys: Tensor, checksums: Tensor, parts: Sequence[Tensor]) -> None:
        """Write rows into the next free slots. Raises CacheFull, and adds none, if the disk refuses."""
        start, count = self.used, len(keys)
        try:
            for part, values in zip(self.parts, parts):
                _write(self.file, self.starts[part.name] + start * part.bytes, values)
            _write(self.file, self.starts[CHECKSUMS] + start * _CHECKSUMS.bytes, checksums)
            _write(self.file, self.starts[KEYS] + start * _KEYS.bytes, keys)
        except OSError as error:
            raise full_disk(self.path, count * sum(part.bytes for part in self.parts), error) from error
        self.keys[start : start + count] = keys
        self.checksums[start : start + count] = checksums
        self.used += count
        self.was_read = False

    def index_digest(self) -> str:
        """A digest of keys and checksums."""
        digest = hashlib.blake2b(digest_size=16)
        for tensor in (self.keys, self.checksums):
            digest.update(tensor.numpy().data)
        return digest.hexdigest()

    def first_bad_slot(self, reader: RowReader) -> int | None:
        """Read all rows and compare their checksums. Returns the first slot whose row does not fit its checksum."""
        chunk = max(1, _VERIFIED_AT_ONCE // sum(part.bytes for part in self.parts))
        for start in range(0, self.rows, chunk):
            keys = self.keys[start : start + chunk]
            parts = [torch.empty((len(keys), *part.shape), dtype=part.dtype) for part in self.parts]
            for part, values in zip(self.parts, parts):
                _read(self.file, self.starts[part.name] + start * part.bytes, values, self.path)
            found = checksums_of(reader, keys, parts)
            bad = (found != self.checksums[start : start + chunk]) & (keys >= 0)
            if bad.any():
                return start + int(bad.nonzero()[0])
        return None

    def use_whole_rows(self, reader: RowReader) -> None:
        """Use the rows before the first that was not written whole."""
        bad, self.was_read = self.first_bad_slot(reader), True
        self.used = min(self.leading_rows(), self.rows if bad is None else bad)

    def free_the_rest(self) -> None:
        """Free all slots behind the rows that are used, whatever a crash or a refused write has left in them."""
        self.keys[self.used :] = -1
        _write(self.file, self.starts[KEYS], self.keys)
        _write(self.file, self.starts[CHECKSUMS], self.checksums)

    def close(self) -> None:
        """Close the file; whoever was its writer is so no more."""
        os.close(self.file)


REMEDY = "Delete its column with `stablekd cache gc DIR --columns NAME`; the next run fills it anew."


def nothing_written(path: Path) -> bool:
    """Whether the writer of a shard died before the header was there."""
    with open_regular(path) as file:
        return not any(file.read(DATA_START))


def rows_in(path: Path) -> int:
    """How many rows a shard has room for, as its header says. Raises CacheError if that cannot be read."""
    try:
        with open_regular(path) as file:
            length = int.from_bytes(file.read(8), "little")
            rows = json.loads(file.read(min(length, DATA_START)))[KEYS]["shape"][0]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise CacheError(f"The header of {path} cannot be read ({first_line(error)}). {REMEDY}") from error
    if type(rows) is not int or not 0 < rows <= MOST_ROWS:
        raise CacheError(f"The header of {path} says that it has room for {rows!r:.30} rows: it is damaged. {REMEDY}")
    return rows


def _check_header(path: Path, file: int, header: bytes, size: int) -> None:
    try:
        found, status = os.pread(file, DATA_START, 0), os.fstat(file)
    except OSError as error:
        raise CacheError(f"The shard {path} cannot be read ({error.strerror}). {REMEDY}") from error
    if found != header:
        other = _column_in(found) not in (None, _column_in(header))
        what = "is that of rows of something else" if other else "is not what was written there: it is damaged"
        raise CacheError(f"The header of {path} {what}. {REMEDY}")
    if status.st_size != size:
        raise CacheError(f"{path} has {status.st_size} bytes; its rows need {size}. {REMEDY}")


def _column_in(header: bytes) -> str | None:
    try:
        return json.loads(header[8:])["__metadata__"]["column"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


def checksums_of(reader: RowReader, keys: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """CRC-32C of each row number `[N]` and the row's parts `[N, ...]`, contiguous: int32 `[N]`."""
    out = torch.empty(len(keys), dtype=torch.int32)
    numbers = [(values[0].numel() * values.element_size() if len(keys) else 0, values.data_ptr()) for values in parts]
    reader.checksum(keys.data_ptr(), len(keys), numbers, out.data_ptr())
    return out


def _header(parts: Sequence[Part], rows: int, column: str) -> tuple[bytes, dict[str, int], int]:
    """The first 4096 bytes of the file, where each tensor begins in it, and the size of the file."""
    entries: dict[str, dict] = {"__metadata__": {"format": f"stablekd rows {FORMAT}", "column": column}}
    starts, position = {}, 0
    for part in (*parts, _KEYS, _CHECKSUMS):
        end = position + rows * part.bytes
        entries[part.name] = {
            "dtype": _DTYPES[part.dtype],
            "shape": [rows, *part.shape],
            "data_offsets": [position, end],
        }
        starts[part.name] = DATA_START + position
        position = end
    text = json.dumps(entries).encode().ljust(DATA_START - 8)
    if len(text) > DATA_START - 8:
        raise CacheError(f"A row of {len(parts)} parts does not fit into the header of a shard.")
    return (DATA_START - 8).to_bytes(8, "little") + text, starts, DATA_START + position


def _write(file: int, offset: int, data: bytes | Tensor) -> None:
    view = memoryview(data) if isinstance(data, bytes) else as_bytes(data)
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written


def _read(file: int, offset: int, into: Tensor, path: Path) -> None:
    view = as_bytes(into)
    while view:
        try:
            got = os.preadv(file, [view], offset)
        except OSError as error:
            raise CacheError(f"{path} cannot be read: {error.strerror}. {REMEDY}") from error
        if not got:
            raise CacheError(f"{path} ends too early. {REMEDY}")
        view, offset = view[got:], offset + got
