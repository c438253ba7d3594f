"""What the cache asks of the file system: locks between processes, a budget, and errors of a disk that is full."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stablekd_fast.errors import CacheFull
from stablekd_fast.files.owned import open_own, try_lock
from stablekd_fast.files.reading import open_regular

SUFFIX = ".safetensors"
"""The ending of every file of rows."""
LOCK = ".lock"
_SHARD = re.compile(rf"(\.?)shard-(\d{{5,}}){re.escape(SUFFIX)}")


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
            used = sum(_size(path) for path in self.folder.rglob(f"*{SUFFIX}"))
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
        file = open_own(folder / LOCK, os.O_RDWR)
    except OSError as error:
        raise full_disk(folder / LOCK, 0, error) from error
    try:
        try_lock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def hold(folder: Path) -> int:
    """Keep `cache gc` from the folder for as long as the descriptor that is returned is open.

    Raises FileNotFoundError if there is no such folder.
    """
    while True:
        held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            try_lock(held, fcntl.LOCK_SH)  # waits while it is being deleted
            if os.path.samestat(os.fstat(held), os.stat(folder)):
                return held
        except OSError:
            os.close(held)
            raise
        os.close(held)


@contextlib.contextmanager
def unused(folder: Path) -> Iterator[bool]:
    """A context in which nobody can open the folder's rows; gives False if somebody has them open."""
    held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield try_lock(held)
    finally:
        os.close(held)


def shards_in(folder: Path) -> list[Path]:
    """The files that have a shard's name: those that are not finished, then the others."""
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if _SHARD.fullmatch(e.name) and e.is_file(follow_symlinks=False)]
    return [folder / name for name in sorted(names)]


def is_shard(name: str) -> bool:
    """Whether this is the name of a finished shard."""
    found = _SHARD.fullmatch(name)
    return found is not None and not found[1]


def next_shard(folder: Path) -> Path:
    """A name for a new shard, whatever else lies in the folder."""
    found = (_SHARD.fullmatch(name) for name in os.listdir(folder))
    number = max((int(name[2]) for name in found if name is not None), default=-1) + 1
    return folder / f".shard-{number:05d}{SUFFIX}"


def flush_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _size(path: Path) -> int:
    """Bytes of a file, 0 for one that is gone meanwhile."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def unlock(file: int) -> None:
    """Stop being the file's writer; it stays open."""
    fcntl.flock(file, fcntl.LOCK_UN)


def is_locked(path: Path) -> bool:
    """Whether the file has a writer. A file that cannot be opened has none that could be harmed."""
    with contextlib.suppress(OSError), open_regular(path) as file:
        return not try_lock(file.fileno())
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
