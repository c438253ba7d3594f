"""One file of rows: a safetensors file whose row count is fixed when it is opened.

    bytes 0..4095      header: 8 bytes of length, JSON, spaces
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

from stablekd_fast.cache.disk import full_disk, is_locked, lock
from stablekd_fast.errors import CacheError

DATA_START = 4096
KEYS, CHECKSUMS = "keys", "checksums"
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
        """The part that `plain` described."""
        return Part(values["name"], _BY_NAME[values["dtype"]], tuple(values["shape"]))


_KEYS, _CHECKSUMS = Part(KEYS, torch.int64, ()), Part(CHECKSUMS, torch.int32, ())


class RowReader(Protocol):
    """What a shard asks of the C++ core's `RowReader`."""

    def checksum(self, rows: int, count: int, parts: Sequence[tuple[int, int]], out: int, /) -> None:
        """Write the checksums of `count` rows to the address `out`; `parts` are (bytes of a row, address)."""


class Shard:
    """An open shard with room for `rows` rows, of which `used` are written.

    `keys` and `checksums` are what the file holds of them. `path` may change by renaming; the file stays open.
    """

    def __init__(self, path: Path, file: int, parts: Sequence[Part], rows: int) -> None:
        self.path, self.file, self.parts, self.rows = path, file, tuple(parts), rows
        self.header, self.starts, self.size = _header(self.parts, rows)
        self.keys = torch.full((rows,), -1, dtype=torch.int64)
        self.checksums = torch.zeros(rows, dtype=torch.int32)
        self.used = 0
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)  # reading ahead would fetch rows that nobody asked for

    @staticmethod
    def create(path: Path, parts: Sequence[Part], rows: int) -> Shard:
        """Make a file with room for `rows` rows, and take all of it from the disk now.

        Raises CacheFull, and leaves no file, if the disk refuses.
        """
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise full_disk(path, 0, error) from error
        shard = Shard(path, file, parts, rows)
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
    def open(path: Path, parts: Sequence[Part], rows: int, *, write: bool = False) -> Shard:
        """Open a file and read its keys and checksums.

        Raises CacheError if the file is missing, has another size than it should, or has another header.
        """
        try:
            file = os.open(path, (os.O_RDWR if write else os.O_RDONLY) | os.O_CLOEXEC)
        except OSError as error:
            raise CacheError(f"The shard {path} cannot be opened ({error.strerror}). {REMEDY}") from error
        shard = Shard(path, file, parts, rows)
        try:
            shard._check_header()
            shard.read_index()
        except CacheError:
            shard.close()
            raise
        return shard

    @staticmethod
    def open_finished(path: Path, parts: Sequence[Part], rows: int, digest: str, reader: RowReader) -> Shard:
        """Open a file that is not written any more.

        Raises CacheError as `open` does, and where `digest` is not that of the file's keys and checksums.
        """
        shard = Shard.open(path, parts, rows)
        if shard.index_digest() != digest:
            slot = shard.first_bad_slot(reader)
            where = "its row numbers" if slot is None else f"row {int(shard.keys[slot])}, slot {slot}"
            shard.close()
            raise CacheError(f"The index of {path} is not what was written there: {where} is damaged. {REMEDY}")
        shard.used = int((shard.keys >= 0).sum())
        return shard

    @staticmethod
    def take_up(path: Path, parts: Sequence[Part], reader: RowReader) -> Shard | None:
        """Become the writer of a file that a dead writer left, and go on behind its last whole row.

        None if the writer lives, or if it died before the header was whole; then the file is deleted.
        """
        rows = rows_in(path)
        try:
            shard = Shard.open(path, parts, rows, write=True) if rows else None
        except CacheError:
            shard = None
        if shard is None:
            if not is_locked(path):
                path.unlink(missing_ok=True)
            return None
        if not lock(shard.file):
            shard.close()
            return None
        shard.keep_whole_rows(reader)
        return shard

    @staticmethod
    def size_of(parts: Sequence[Part], rows: int) -> int:
        """Bytes of a file with room for `rows` rows."""
        return _header(parts, rows)[2]

    def read_index(self) -> None:
        """Read keys and checksums as the file has them now."""
        for tensor, name in ((self.keys, KEYS), (self.checksums, CHECKSUMS)):
            _read(self.file, self.starts[name], tensor, self.path)

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

    def keep_whole_rows(self, reader: RowReader) -> None:
        """After a crash, free all slots behind the last row that was written whole."""
        bad = self.first_bad_slot(reader)
        self.used = min(self.leading_rows(), self.rows if bad is None else bad)
        self.keys[self.used :] = -1
        _write(self.file, self.starts[KEYS], self.keys)

    def close(self) -> None:
        """Close the file; whoever was its writer is so no more."""
        os.close(self.file)

    def _check_header(self) -> None:
        found = os.pread(self.file, DATA_START, 0)
        if found != self.header:
            raise CacheError(f"The header of {self.path} is not what was written there: it is damaged. {REMEDY}")
        size = os.fstat(self.file).st_size
        if size != self.size:
            raise CacheError(f"{self.path} has {size} bytes; its {self.rows} rows need {self.size}. {REMEDY}")


REMEDY = "Delete its column with `stablekd cache gc DIR --columns NAME`; the next run fills it anew."


def rows_in(path: Path) -> int | None:
    """How many rows a shard has room for, as its header says; None if that cannot be read."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            return json.loads(file.read(min(length, DATA_START)))[KEYS]["shape"][0]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


def checksums_of(reader: RowReader, keys: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """CRC-32C of each row number `[N]` and the row's parts `[N, ...]`, contiguous: int32 `[N]`."""
    out = torch.empty(len(keys), dtype=torch.int32)
    numbers = [(values[0].numel() * values.element_size() if len(keys) else 0, values.data_ptr()) for values in parts]
    reader.checksum(keys.data_ptr(), len(keys), numbers, out.data_ptr())
    return out


def _header(parts: Sequence[Part], rows: int) -> tuple[bytes, dict[str, int], int]:
    """The first 4096 bytes of the file, where each tensor begins in it, and the size of the file."""
    entries: dict[str, dict] = {"__metadata__": {"format": "stablekd rows 1"}}
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
    return (DATA_START - 8).to_bytes(8, "little") + text, starts, DATA_START + position


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor, in place if it is contiguous."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def _write(file: int, offset: int, data: bytes | Tensor) -> None:
    view = memoryview(data) if isinstance(data, bytes) else as_bytes(data)
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written


def _read(file: int, offset: int, into: Tensor, path: Path) -> None:
    view = as_bytes(into)
    while view:
        got = os.preadv(file, [view], offset)
        if not got:
            raise CacheError(f"{path} ends too early. {REMEDY}")
        view, offset = view[got:], offset + got
