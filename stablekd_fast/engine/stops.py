"""After which step a run ends that was asked to: the same one on all ranks."""

from __future__ import annotations

from stablekd_fast.distributed import Ranks
from stablekd_fast.execution.signals import Signals


class Stops:
    """Agrees on the last step through the ranks' store, without an exchange.

    A rank that is asked names a step; all look for it after every `every`-th step. The named one is so far ahead that
    no rank can have passed it: none is further than `ahead` steps behind the next exchange of all ranks, which needs
    the one that is asked.

    Args:
        every: the steps between two looks at the store.
        meets: the steps between two exchanges of all ranks.
        ahead: how many steps a rank's host may be ahead of its device.
    """

    def __init__(self, signals: Signals, ranks: Ranks, every: int, meets: int, ahead: int) -> None:
        self.signals, self.ranks = signals, ranks
        self.every, self.meets, self.ahead = every, meets, ahead
        self._named = False

    def due(self, step: int) -> int | None:
        """The number of the signal, if the run ends after this step."""
        if self.ranks.size == 1:
            return self.signals.asked
        if self.signals.asked is not None and not self._named:
            self._named = True
            self.ranks.name_once("stop", [self._last(step), self.signals.asked])
        if step % self.every:
            return None
        named = self.ranks.named("stop")
        return named[1] if named is not None and named[0] <= step else None

    def _last(self, step: int) -> int:
        """The first step at which all look and that no rank can have passed yet, if one is asked after `step`."""
        passed = _next(step, self.meets) + self.ahead
        return _next(passed + 1, self.every)


def _next(step: int, every: int) -> int:
    """The first multiple of `every` that is not below `step`."""
    return -(-step // every) * every
