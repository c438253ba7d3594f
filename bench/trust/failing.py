"""Runs in which one call that changes a file is refused by the system: each call in turn, by four errors in turn."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

from stablekd_fast.bench.trust.calls import Trouble
from stablekd_fast.bench.trust.runs import Runs

ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS)


def failing_calls(folder: Path, first: int, most: int | None = None) -> Iterator[list[str]]:
    """Let each call fail once (`most` of them, spread over the run), and resume. Yields the faults of each trial from
    the one numbered `first` on."""
    trial = -1
    for cached in (True, False):
        runs = Runs(folder / ("cache" if cached else "relay"), cached=cached)
        runs.clear()
        calls = runs.run().calls or 0
        whole = runs.weights_reached()
        step = 1 if most is None else max(1, 2 * calls // most)
        for number in range(1, calls + 1, step):
            trial += 1
            if trial < first:
                continue
            runs.clear()
            error = ERRORS[number % len(ERRORS)]
            ended = runs.run(Trouble(fails=number, error=error))
            faults = [] if ended.is_clear else [f"ends with {ended.codes}: {ended.said[-400:]}"]
            faults += runs.faults(whole, runs.finish())
            what = f"{'cache' if cached else 'relay'}, call {number} of {calls} fails with {errno.errorcode[error]}"
            yield [f"{what}: {fault}" for fault in faults]
        runs.close()
