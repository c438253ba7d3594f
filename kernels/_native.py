"""The C++ core, and why it is missing where it is. The only file that imports `stablekd_fast._C`."""

from __future__ import annotations

import ctypes
import re
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

_OPENMP_RUNTIME = re.compile(r"/lib(gomp|iomp5|omp)\b[^/]*\.so[^/]*$")


def openmp_runtimes() -> list[str]:
    """Paths of the OpenMP runtimes in this process's memory, torch's own before those of other packages."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    files = {line.split(maxsplit=5)[5] for line in maps if "/" in line}
    home = str(Path(torch.__file__).parent)
    return sorted(filter(_OPENMP_RUNTIME.search, files), key=lambda file: (not file.startswith(home), file))


def _load() -> tuple[Any, str | None]:
    """Return the core and None, or None and the reason.

    The core leaves its OpenMP calls unresolved, so that it shares torch's runtime instead of bringing a second one
    with threads of its own. Python hides that runtime's names; opening the mapped file again shows them.
    """
    try:
        for runtime in openmp_runtimes()[:1]:
            ctypes.CDLL(runtime, mode=ctypes.RTLD_GLOBAL)
        return import_module("stablekd_fast._C"), None
    except (ImportError, OSError) as error:
        reason = f"the C++ core does not load ({error}); reinstall with a C++ compiler to build it"
        warnings.warn(f"{reason}. Operators use the slower reference implementation.", RuntimeWarning, stacklevel=2)
        return None, reason


core, reason = _load()
