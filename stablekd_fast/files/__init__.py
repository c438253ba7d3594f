"""Write files whole or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from stablekd_fast.errors import TrainingError
from stablekd_fast.files.owned import make_temporary, remove_left_over


def write_atomically(path: Path, *pieces: bytes | memoryview) -> None:
    """Write `pieces`, one behind the other, to a temporary file beside `path`, flush it to disk, and rename it. What
    killed processes left of such files is removed.

    Raises TrainingError, and leaves what was there before, if the disk refuses.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_left_over(path)
        descriptor, temporary = make_temporary(path)
        with open(descriptor, "wb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(descriptor)
            os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            if temporary is not None:
                temporary.unlink()
        raise TrainingError(
            f"Could not write {path} ({sum(map(len, pieces))} bytes): {error.strerror or error}. What was there before "
            "is untouched; free some space or choose another --out."
        ) from error
