"""Where encoded images lie: in a file each, or in stretches of archives. Records are numbered like the samples of their
split."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from stablekd_fast.data.pixels import BadImage


class Records(Protocol):
    """Encoded images by number."""

    def __len__(self) -> int: ...

    def name(self, number: int) -> Path:
        """Return what a report calls the image."""
        ...

    def read(self, number: int) -> bytes:
        """Return the encoded image. Raises `BadImage` where it cannot be read. Called from several threads."""
        ...

    def identity(self) -> list[str]:
        """Return a line for each image that tells it from others without reading it: the end of its name, and its size
        in bytes."""
        ...


@dataclass(frozen=True)
class FileRecords:
    """Every image is a file of its own."""

    paths: list[Path]

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, number: int) -> Path:
        return self.paths[number]

    def read(self, number: int) -> bytes:
        try:
            return self.paths[number].read_bytes()
        except OSError as error:
            raise BadImage(self.paths[number], error.strerror or str(error)) from error

    def identity(self) -> list[str]:
        return [f"{'/'.join(path.parts[-2:])} {path.stat().st_size}" for path in self.paths]


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

    def __len__(self) -> int:
        return len(self.names)

    def name(self, number: int) -> Path:
        return self.archives[self.places[number, 0]] / self.names[number]

    def read(self, number: int) -> bytes:
        archive, offset, size = self.places[number].tolist()
        content = os.pread(self._files[archive].fileno(), size, offset)
        if len(content) < size:
            raise BadImage(self.name(number), f"its archive ends after {len(content)} of its {size} bytes")
        return content

    def identity(self) -> list[str]:
        return [
            f"{self.archives[a].name} {name} {size}" for name, (a, _, size) in zip(self.names, self.places.tolist())
        ]

    def __getstate__(self) -> dict:
        """Leave open files out: another process must open them for itself."""
        return {name: value for name, value in self.__dict__.items() if name != "_files"}

    @cached_property
    def _files(self) -> list[BinaryIO]:
        return [open(path, "rb") for path in self.archives]
