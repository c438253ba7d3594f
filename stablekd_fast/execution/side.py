"""A second stream of a GPU, on which the next batch is made ready while the current one trains."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Side:
    """Work beside that of the current stream of `device`; on a CPU, and where it is not `used`, in its order.

    Memory that is allocated `ahead` and read on the current stream needs no mark: until what was read is `taken`,
    nothing else is begun ahead.
    """

    def __init__(self, device: torch.device, used: bool = True) -> None:
        self._device = device
        self._stream = _second_stream(device) if used and device.type == "cuda" else None
        self._event = torch.cuda.Event() if self._stream is not None else None
        self._taken = False

    def begin(self) -> None:
        """What is given `ahead` from now on begins when all was `taken` that was made ready; where nothing was since
        the last `begin`, or `halt` was called, when all has ended that the current stream was given."""
        if self._stream is None or self._event is None:
            return
        if not self._taken:
            self._event.record(torch.cuda.current_stream(self._device))
        self._stream.wait_event(self._event)
        self._taken = False

    @contextmanager
    def ahead(self) -> Iterator[None]:
        """A context whose work is given to the second stream."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """What the current stream is given from now on begins when all has ended that was given `ahead`."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def taken(self) -> None:
        """The current stream was given all that reads what was made ready."""
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(self._device))
            self._taken = True

    def halt(self) -> None:
        """Something else was or will be done in between, on the current stream, with what works ahead."""
        self._taken = False


@functools.cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all: libraries keep workspaces for each stream that they ever met."""
    return torch.cuda.Stream(device)
