"""Files of our own: opened where no link leads elsewhere, written whole or not at all, and locked while in use."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

from stablekd_fast.errors import ConfigError

RUN_LOCK = ".run.lock"
_TRIES = 100
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF)
"""What file systems answer that cannot lock a file, or (EBADF) not one that is open for reading, or a folder."""


def open_own(path: str | os.PathLike[str], flags: int) -> int:
    """Open a file of ours, made if it is missing, and return its descriptor. A link in its place is refused: it would
    lead to a file of somebody else.

    Raises OSError with a reason to be quoted in a sentence.
    """
    try:
        return os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "There is a link in its place, which is not followed", os.fspath(path)) from None
        raise


def try_lock(descriptor: int, how: int = fcntl.LOCK_EX | fcntl.LOCK_NB) -> bool:
    """Lock an open file or folder until it is closed; False if another process has it. Where the file system knows no
    locks, nobody has it. `how` is what `flock` takes: without LOCK_NB it waits until the others are done.

    Raises OSError if the system refuses for another reason.
    """
    try:
        fcntl.flock(descriptor, how)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise
    return True


def make_temporary(path: Path) -> tuple[int, Path]:
    """Make a temporary file beside `path` that nobody else has, locked for as long as it is open."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    for _ in range(_TRIES):
        with contextlib.suppress(FileExistsError):
            descriptor = open_own(temporary, os.O_WRONLY | os.O_EXCL)
            if try_lock(descriptor) and _is_at(descriptor, temporary):
                return descriptor, temporary
            os.close(descriptor)  # somebody took it for a left-over one
            continue
        temporary.unlink(missing_ok=True)  # of a process that had this one's number
    raise OSError(errno.EEXIST, "Another process makes it again and again", str(temporary))


def remove_left_over(path: Path) -> None:
    """Remove temporary files of `path` that processes left that are no more."""
    name = re.compile(rf"\.{re.escape(path.name)}\.\d+\.tmp")
    with contextlib.suppress(OSError), os.scandir(path.parent) as entries:
        for entry in entries:
            if name.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                with contextlib.suppress(OSError):
                    descriptor = os.open(entry.path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
                    if try_lock(descriptor):
                        os.unlink(entry.path)
                    os.close(descriptor)


@contextlib.contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Hold a folder for one run: a second one that is started meanwhile is refused. A crash lets go of it.

    Raises ConfigError that names the process which holds it. A folder that was not there and in which nothing was
    written is removed.
    """
    path, there = folder / RUN_LOCK, folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(path)
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be used for a run: {path}: {error.strerror}. Choose another --out."
        ) from error
    try:
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)
        os.close(descriptor)
        if not there:
            with contextlib.suppress(OSError):
                folder.rmdir()  # if nothing is in it


def _locked(path: Path) -> int:
    for _ in range(_TRIES):
        descriptor = open_own(path, os.O_RDWR)
        if not try_lock(descriptor):
            holder = os.pread(descriptor, 200, 0).decode("utf-8", "replace")
            os.close(descriptor)
            raise ConfigError(
                f"{path.parent} already holds a run that goes on ({holder or 'another process'}). Wait for its end, or "
                "choose another --out."
            )
        if _is_at(descriptor, path):
            return descriptor
        os.close(descriptor)  # its run has ended and removed it
    raise OSError(errno.EAGAIN, "It is made and removed again and again")


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one that lies at `path`."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False
