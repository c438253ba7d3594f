"""How the C library keeps memory between steps."""

from __future__ import annotations

import ctypes


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory: by default every large tensor is mapped and faulted in anew.

    Returns whether this C library can be told so.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    trim_threshold, mmap_threshold, one_gigabyte = -1, -3, 1 << 30
    return all([mallopt(mmap_threshold, one_gigabyte), mallopt(trim_threshold, one_gigabyte)])
