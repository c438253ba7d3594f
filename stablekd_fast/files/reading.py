"""The gate through which files from elsewhere are opened: regular files only, of a size that is looked at first."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from typing import BinaryIO

from stablekd_fast.errors import StableKDError, first_line

DOCUMENT = 256 << 20
"""The bytes of the largest document (JSON, a log) that is read as a whole."""


@contextlib.contextmanager
def foreign(path: str | os.PathLike[str], error: type[StableKDError], remedy: str) -> Iterator[None]:
    """A context in which a file of others is taken apart: whatever goes wrong becomes `error`, in one sentence.

    Readers of damaged bytes raise whatever they stumble over, and no list of that is complete.
    """
    try:
        yield
    except StableKDError:
        raise
    except Exception as raised:
        why = "it announces more than memory holds" if isinstance(raised, MemoryError) else first_line(raised)
        raise error(f"Cannot read {path}: {why[:300]}. {remedy}") from raised


def check_format(what: str, found: object, reads: int, error: type[StableKDError], remedy: str) -> None:
    """Raise `error`, in one sentence and `remedy`, unless a file has the format that this version reads."""
    if found != reads:
        raise error(f"{what} is of format {found!r:.20}; this version reads {reads}. {remedy}")


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file for reading, without waiting.

    Raises OSError, with a reason to be quoted in a sentence, for a pipe, a device, a socket or a folder.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"
        raise OSError(code, f"It is {kind}, not a file", os.fspath(path))
    return open(path, "rb", opener=lambda *_: descriptor)


def read_document(path: str | os.PathLike[str], most: int = DOCUMENT) -> bytes:
    """Read a whole file of at most `most` bytes. Raises OSError as `open_regular` does, and for a larger one."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(size + 1) if size <= most else b""
    if max(size, len(content)) > most:
        raise OSError(errno.EFBIG, f"It is larger than {most:,} bytes", os.fspath(path))
    return content
