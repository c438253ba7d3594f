"""The library of `calls.c`, built, preloaded and told what to do."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stablekd_fast.errors import StableKDError


@dataclass(frozen=True)
class Trouble:
    """What happens to the calls of a process that change files below some folders; nothing by default."""

    fails: int = 0
    """The number of the call that fails, from 1."""
    error: int = 0
    kills: int = 0
    """The number of the call before which the process is killed."""
    log: str = ""
    """A file for all calls."""


def build(folder: Path) -> Path:
    """Compile the library into a folder. Raises StableKDError where no C compiler works."""
    made = folder / "calls.so"
    command = ["cc", "-O2", "-shared", "-fPIC", "-o", str(made), str(Path(__file__).with_name("calls.c"))]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", "") or str(error)
        raise StableKDError(f"A C compiler is needed for these lines, but `cc` failed: {said[:300]}") from error
    return made


def arm(folders: Sequence[Path], trouble: Trouble) -> None:
    """Watch this process's calls below the folders from now on."""
    library = ctypes.CDLL(None)
    below = "\n".join(str(folder) for folder in folders).encode()
    library.calls_arm(
        below, ctypes.c_long(trouble.fails), trouble.error, ctypes.c_long(trouble.kills), trouble.log.encode()
    )


def count() -> int:
    """How many calls there were since `arm`."""
    library = ctypes.CDLL(None)
    library.calls_count.restype = ctypes.c_long
    return library.calls_count()


def preloaded(library: Path) -> dict[str, str]:
    """The environment of a process that has the library before its C library."""
    return {**os.environ, "LD_PRELOAD": str(library)}
