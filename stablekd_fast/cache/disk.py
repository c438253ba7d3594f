"""What the cache asks of the file system: locks between processes, a budget, and errors of a disk that is full."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stablekd_fast.errors import CacheFull
from stablekd_fast.files.owned import open_own

SUFFIX = ".safetensors"
"""The ending of every file of rows."""
_LOCK = ".lock"


@dataclass(frozen=True)
class DiskBudget:
    """At most `limit` bytes in all files of rows under `folder`; None for as much as the disk has."""

    folder: Path
    limit: int | None = None

    @contextlib.contextmanager
    def room_for(self, more: int) -> Iterator[None]:
        """Keep other processes from the budget until the block ends. Raises CacheFull if `more` bytes do not fit."""
        if self.limit is None:
            yield
            return
        with locked(self.folder):
            used = sum(path.stat().st_size for path in self.folder.rglob(f"*{SUFFIX}"))
            if used + more > self.limit:
                raise CacheFull(
                    f"The cache in {self.folder} holds {used} bytes, and {more} more would exceed its budget of "
                    f"{self.limit}. What is stored stays readable; raise --cache.disk_budget for more."
                )
            yield


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock until the block ends. The folder is made if it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open_own(folder / _LOCK, os.O_RDWR)
    except OSError as error:
        raise full_disk(folder / _LOCK, 0, error) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def lock(file: int) -> bool:
    """Become the writer of an open file, until it is closed; False if another process is."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def unlock(file: int) -> None:
    """Stop being the file's writer; it stays open."""
    fcntl.flock(file, fcntl.LOCK_UN)


def is_locked(path: Path) -> bool:
    """Whether the file has a writer. A file that cannot be opened has none that could be harmed."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return not lock(file.fileno())
    return False


def drop_pages(path: Path) -> None:
    """Let the system forget what it holds of a file in main memory, so that the next reading is one from disk."""
    file = os.open(path, os.O_RDONLY)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


def full_disk(path: Path, size: int, error: OSError) -> CacheFull:
    """The error to raise where the system refused `size` bytes for `path`, or the path itself if `size` is 0."""
    reason = error.strerror or str(error)
    if error.errno == errno.EFBIG:
        reason = "files may not become that large here"
    what = f"{size} bytes for {path} were" if size else f"{path} was"
    return CacheFull(
        f"{what} refused: {reason}. What is stored already stays readable; free some space, or set --cache.disk_budget."
    )
