"""Runs that are killed or asked to end at moments drawn at random, and resumed."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from pathlib import Path

from stablekd_fast.bench.trust.calls import Trouble
from stablekd_fast.bench.trust.runs import Ended, Runs

CONFIGURATIONS = {"relay": (False, 1), "cache": (True, 1), "relay, 2 ranks": (False, 2), "cache, 2 ranks": (True, 2)}


def kills(folder: Path, first: int, count: int, number: int) -> Iterator[list[str]]:
    """End `count` runs by the signal `number`, each up to three times before it may finish. Yields the faults of each
    run from the one numbered `first` on.

    A SIGKILL comes after a time drawn at random, or just before a call that changes a file; a SIGTERM after a time.
    """
    each = count // len(CONFIGURATIONS)
    for place, (name, (cached, ranks)) in enumerate(CONFIGURATIONS.items()):
        trials = range(max(first, place * each), (place + 1) * each)
        if not trials:
            continue
        runs = Runs(folder / name.replace(", ", "-").replace(" ", ""), cached=cached, ranks=ranks)
        runs.clear()
        alone = runs.run()
        whole = runs.weights_reached()
        for trial in trials:
            runs.clear()
            draw = random.Random(f"{number} {trial}")
            faults = []
            for _ in range(draw.choice((1, 1, 2, 3))):
                ended = _killed(runs, draw, number, alone)
                faults += _of_the_end(ended, number)
            yield [f"{name}, trial {trial}: {fault}" for fault in faults + runs.faults(whole, runs.finish())]
        runs.close()


def _killed(runs: Runs, draw: random.Random, number: int, alone: Ended) -> Ended:
    if number == signal.SIGKILL and draw.random() < 0.5:
        return runs.run(Trouble(kills=draw.randint(1, alone.calls or 1)))
    return runs.run(signal=(number, draw.uniform(0.05, 1.1) * alone.seconds))


def _of_the_end(ended: Ended, number: int) -> list[str]:
    """A run that was asked to end says so; one that was killed says nothing wrong."""
    if number == signal.SIGKILL:
        return [] if "Traceback" not in ended.said else [f"a traceback: {ended.said[-3000:]}"]
    asked = all(code in (0, 128 + number, -number) for code in ended.codes)  # -number: before Python was there to hear
    return [] if asked and "Traceback" not in ended.said else [f"ends with {ended.codes}: {ended.said[-3000:]}"]
