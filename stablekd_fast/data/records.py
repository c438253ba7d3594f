"""Where encoded images lie: in a file each, or in stretches of archives. Records are numbered like the samples of their
split."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from stablekd_fast.data.pixels import BadImage
from stablekd_fast.files.checksums import masked_crc32c
from stablekd_fast.files.reading import DOCUMENT, open_regular, read_document


class Records(Protocol):
    """Encoded images by number."""

    def __len__(self) -> int: ...

    def name(self, number: int) -> Path:
        """Return what a report calls the image."""
        ...

    def read(self, number: int) -> bytes:
        """Return the encoded image. Raises `BadImage` where it cannot be read. Called from several threads."""
        ...

    def told_by(self) -> Iterable[bytes]:
        """Return what tells each image from the others of the split: its name inside the split's folder or archive."""
        ...

    def stamp(self, number: int) -> tuple[int, int]:
        """Return size in bytes and time of change in nanoseconds of what holds the image; zeros if it is not there."""
        ...

    def taken(self, numbers: Sequence[int]) -> Records:
        """Return the records of these numbers alone, in this order."""
        ...


@dataclass(frozen=True)
class FileRecords:
    """Every image is a file of its own."""

    folder: str
    names: Sequence[str]
    """The files' names inside the folder."""

    @staticmethod
    def of(paths: Sequence[str | Path]) -> FileRecords:
        """Return the records of these files, named from the folder that holds them all."""
        texts = [os.path.abspath(path) for path in paths]
        folder = os.path.commonpath([os.path.dirname(text) for text in texts]) if texts else ""
        return FileRecords(folder, [os.path.relpath(text, folder) for text in texts])

    def __len__(self) -> int:
        return len(self.names)

    def name(self, number: int) -> Path:
        return Path(self.folder, self.names[number])

    def read(self, number: int) -> bytes:
        try:
            return read_document(os.path.join(self.folder, self.names[number]))
        except OSError as error:
            raise BadImage(self.name(number), error.strerror or str(error)) from error

    def told_by(self) -> Iterator[bytes]:
        return map(os.fsencode, self.names)

    def stamp(self, number: int) -> tuple[int, int]:
        return _stamp(os.path.join(self.folder, self.names[number]))

    def taken(self, numbers: Sequence[int]) -> FileRecords:
        return FileRecords(self.folder, [self.names[number] for number in numbers])


@dataclass(frozen=True, eq=False)
class ArchiveRecords:
    """Images inside archives, read at random."""

    archives: list[Path]
    places: np.ndarray
    """Where each image lies, int64 `[N, 3]`: number of the archive, offset and size in bytes."""
    names: list[str]
    """What each image is called inside its archive."""
    left_out: dict[str, int] = field(default_factory=dict)
    """How many members of the archives are not among the images, by reason."""
    checked: np.ndarray | None = None
    """Offset and size of what holds each image and has TFRecord's checksum behind it, int64 `[N, 2]`; None where there
    are no checksums."""

    def __len__(self) -> int:
        return len(self.names)

    def name(self, number: int) -> Path:
        return self.archives[self.places[number, 0]] / self.names[number]

    def read(self, number: int) -> bytes:
        archive, offset, size = self.places[number].tolist()
        if self.checked is None:
            return self._read(number, archive, offset, size)
        start, length = self.checked[number].tolist()
        content = self._read(number, archive, start, length + 4)
        if masked_crc32c(content[:-4]) != int.from_bytes(content[-4:], "little"):
            raise BadImage(self.name(number), "its record does not fit its checksum")
        return content[offset - start : offset - start + size]

    def _read(self, number: int, archive: int, offset: int, size: int) -> bytes:
        try:
            if size > DOCUMENT:
                raise OSError(errno.EFBIG, f"it is {size:,} bytes long, more than images are")
            content = os.pread(self._files[archive].fileno(), size, offset)
        except OSError as error:
            raise BadImage(self.name(number), error.strerror or str(error)) from error
        if len(content) < size:
            raise BadImage(self.name(number), f"its archive ends after {len(content)} of its {size} bytes")
        return content

    def told_by(self) -> Iterator[bytes]:
        return (os.fsencode(f"{self.archives[a].name}/{n}") for n, a in zip(self.names, self.places[:, 0].tolist()))

    def stamp(self, number: int) -> tuple[int, int]:
        archive, _, size = self.places[number].tolist()
        return size, self._changed[archive]

    def taken(self, numbers: Sequence[int]) -> ArchiveRecords:
        chosen = np.asarray(numbers, np.int64)
        checked = None if self.checked is None else self.checked[chosen]
        return ArchiveRecords(
            self.archives, self.places[chosen], [self.names[n] for n in numbers], self.left_out, checked
        )

    def __getstate__(self) -> dict:
        """Leave open files out: another process must open them for itself."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_files", "_changed")}

    @cached_property
    def _files(self) -> list[BinaryIO]:
        return [open_regular(path) for path in self.archives]

    @cached_property
    def _changed(self) -> list[int]:
        return [_stamp(path)[1] for path in self.archives]


@dataclass(frozen=True, eq=False)
class JoinedRecords:
    """Images of several sources, one source behind the other."""

    sources: list[Records]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def name(self, number: int) -> Path:
        source, own = self._at(number)
        return source.name(own)

    def read(self, number: int) -> bytes:
        source, own = self._at(number)
        return source.read(own)

    def told_by(self) -> Iterator[bytes]:
        return (b"%d/%s" % (place, told) for place, source in enumerate(self.sources) for told in source.told_by())

    def stamp(self, number: int) -> tuple[int, int]:
        source, own = self._at(number)
        return source.stamp(own)

    def taken(self, numbers: Sequence[int]) -> JoinedRecords:
        chosen = np.asarray(numbers, np.int64)
        order = np.argsort(np.searchsorted(self._ends, chosen, side="right"), kind="stable")
        if not np.array_equal(order, np.arange(len(order))):
            raise ValueError("records of several sources are taken in the order of the sources")
        starts = [0, *self._ends[:-1].tolist()]
        within = [chosen[(chosen >= s) & (chosen < e)] - s for s, e in zip(starts, self._ends.tolist())]
        return JoinedRecords([source.taken(own.tolist()) for source, own in zip(self.sources, within)])

    def _at(self, number: int) -> tuple[Records, int]:
        """Return the source that holds a record, and the record's number in it."""
        place = int(np.searchsorted(self._ends, number, side="right"))
        return self.sources[place], number - (int(self._ends[place - 1]) if place else 0)

    @cached_property
    def _ends(self) -> np.ndarray:
        """Behind the last record of each source, int64 `[sources]`."""
        return np.cumsum([len(source) for source in self.sources], dtype=np.int64)


def _stamp(path: str | Path) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns
