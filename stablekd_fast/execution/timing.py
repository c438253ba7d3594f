"""How long a call takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

REPEATS = 3


def seconds(call: Callable[[], object], device: torch.device, repeats: int = REPEATS) -> float:
    """The median of `repeats` calls, after one to warm up."""
    taken = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])
