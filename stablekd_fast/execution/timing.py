"""How long a call takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TypeVar

import torch

REPEATS = 3

T = TypeVar("T")


def seconds(call: Callable[[], object], device: torch.device, repeats: int = REPEATS) -> float:
    """The median of `repeats` calls, after one to warm up."""
    taken = [timed(call, device)[1] for _ in range(repeats + 1)]
    return statistics.median(taken[1:])


def timed(call: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """What a call returns, and the seconds until the device has done what it was given by it, and nothing else."""
    _wait(device)
    start = time.perf_counter()
    result = call()
    _wait(device)
    return result, time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
