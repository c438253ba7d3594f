"""Moments in the work of a device: whether it has come there, how long it took, and what it handed to the host by then.

The engine's events are here.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

_GIVEN_UP: set[torch.device] = set()


def give_up(device: torch.device) -> None:
    """Note that a GPU may be waiting for another process that is gone: whoever waits for it waits for ever."""
    if device.type == "cuda":
        _GIVEN_UP.add(device)


def given_up(device: torch.device | None = None) -> bool:
    """Whether nobody must wait for the device (any device, without one) any more; the process can only end."""
    return bool(_GIVEN_UP) if device is None else device in _GIVEN_UP


class Moment:
    """The end of all work that was given to the current stream of `device` so far; on a CPU, now."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        self._seconds = 0.0
        if device.type == "cuda":
            self._event = event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(device))  # where its stream is, there the event is made
        else:
            self._seconds = time.perf_counter()

    @property
    def passed(self) -> bool:
        """Whether the device has come so far. The host does not wait."""
        return self._event is None or self._event.query()

    def wait(self) -> None:
        """Wait until the device has come so far."""
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, earlier: Moment) -> float:
        """The device's own seconds from `earlier`, of the same device, to this moment; both must have passed."""
        if self._event is None or earlier._event is None:
            return self._seconds - earlier._seconds
        return earlier._event.elapsed_time(self._event) / 1e3


class HostCopy:
    """Copies of tensors on their way to the host, while the device goes on."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        device = tensors[0].device if tensors else torch.device("cpu")
        if device.type == "cuda":
            self._values = [torch.empty_like(tensor, device="cpu", pin_memory=True) for tensor in tensors]
            for value, tensor in zip(self._values, tensors):
                value.copy_(tensor, non_blocking=True)
        else:
            self._values = [tensor.clone() for tensor in tensors]
        self.end = Moment(device)
        """When the copies are there."""

    @property
    def arrived(self) -> bool:
        """Whether `values` would return at once."""
        return self.end.passed

    def values(self) -> list[Tensor]:
        """Wait for the copies and return them."""
        self.end.wait()
        return self._values


class Clock:
    """Adds up what a device's work takes, by name: the seconds between the device's coming to the start of a `timing`
    and its coming to the end.

    On a GPU these are times of the device, not of the host, which runs ahead of it. They are known when the device has
    come so far, so `collect` hands them over later.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.count = 0
        """How many timings have ended so far, collected or not."""
        self._collected = 0
        self._open: deque[tuple[str, Moment, Moment]] = deque()

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        """A context whose work is timed, also where it ends in an error. Timings do not lie within each other."""
        start = Moment(self.device)
        try:
            yield
        finally:
            self._open.append((name, start, Moment(self.device)))
            self.count += 1

    def collect(self, until: int | None = None, *, wait: bool = False) -> dict[str, float]:
        """Seconds by name of the timings that were not collected yet and whose end the device has passed, or, if told
        to `wait`, will pass; none behind the first `until` that were ever made."""
        if wait and self._open:
            self._open[-1][2].wait()
        found: dict[str, float] = {}
        while self._open and (until is None or self._collected < until) and self._open[0][2].passed:
            name, start, end = self._open.popleft()
            found[name] = found.get(name, 0.0) + end.seconds_since(start)
            self._collected += 1
        return found
