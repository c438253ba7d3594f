"""Signals that ask a run to end: SIGTERM (Slurm, Kubernetes, Docker), SIGHUP (a terminal that is closed), SIGINT."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from stablekd_fast.errors import Interrupted, RankError, StableKDError

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass
class Signals:
    """What the process was asked since `watched_signals` began."""

    asked: int | None = None
    """The number of the first signal."""
    waits: bool = False
    """Whether the run ends by itself once it is asked; otherwise it ends where it is."""
    remedy: str = "The same command goes on, with --resume if there is a checkpoint."
    """What to do after an end in the middle, for its message."""
    _before: dict[int, Any] = field(default_factory=dict)

    @contextlib.contextmanager
    def awaited(self, looks: bool) -> Iterator[None]:
        """A context for what looks at `asked` and ends by itself, if it does."""
        self.waits = looks
        try:
            yield
        finally:
            self.waits = False

    def _take(self, number: int, _frame: FrameType | None) -> None:
        self._give_back()  # a second one ends the process at once
        self.asked = number
        if not self.waits:
            raise self.ended()

    def explain(self, error: Exception) -> bool:
        """Whether an error may be what a signal led to: in the midst of an import it comes out as anything, and another
        rank may have ended before."""
        ours = isinstance(error, StableKDError) and not isinstance(error, RankError)
        return self.asked is not None and not ours

    def ended(self) -> Interrupted:
        """The error for an end in the middle."""
        assert self.asked is not None
        return Interrupted(f"Ended by {signal.Signals(self.asked).name}. {self.remedy}", self.asked)

    def _give_back(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())


@contextlib.contextmanager
def watched_signals() -> Iterator[Signals]:
    """A context in which the first signal that asks for an end is noted, or ends what runs with Interrupted, and a
    second one does what it did before.

    Signals that are ignored (under nohup), or that the program handles itself, are left alone; so are all in threads
    other than the main one, where Python takes none.
    """
    signals = Signals()
    if threading.current_thread() is threading.main_thread():
        for number in ENDING:
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                signals._before[number] = signal.signal(number, signals._take)
    try:
        yield signals
    finally:
        signals._give_back()
