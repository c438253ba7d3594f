"""Write files whole or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from stablekd_fast.errors import TrainingError


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to a temporary file beside `path`, flush it to disk, and rename it.

    Raises TrainingError, and leaves what was there before, if the disk refuses.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise TrainingError(
            f"Could not write {path} ({len(data)} bytes): {error.strerror or error}. What was there before is "
            "untouched; free some space or choose another --out."
        ) from error
