"""The lines of the campaign, each of which can be interrupted and goes on."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from stablekd_fast.bench.core import Measured
from stablekd_fast.bench.trust.failing import failing_calls
from stablekd_fast.bench.trust.flips import flips
from stablekd_fast.bench.trust.kills import kills
from stablekd_fast.bench.trust.power import power_loss
from stablekd_fast.bench.trust.soak import soak
from stablekd_fast.errors import ConfigError, nearest


@dataclass(frozen=True)
class Line:
    """One line of the table: what is tried, and the trials of the long and of the short form."""

    what: str
    tried: Callable[..., Iterator[list[str]]]
    """Yields the faults of each trial, given a folder and the number of the first trial."""
    long: tuple
    short: tuple
    """What `tried` is given besides."""


LINES = {
    "kills": Line(
        "runs with and without cache, on one and two ranks, killed (SIGKILL) at random, resumed to the same bits",
        partial(kills, number=signal.SIGKILL), long=(300,), short=(4,),
    ),
    "terms": Line(
        "the same, asked to end (SIGTERM): saved, told, exit code 143, resumed to the same bits",
        partial(kills, number=signal.SIGTERM), long=(60,), short=(4,),
    ),
    "calls": Line(
        "each call that changes a file refused once (ENOSPC, EIO, EDQUOT, EROFS): success or one sentence, and resumed",
        failing_calls, long=(), short=(8,),
    ),
    "power": Line(
        "states that a loss of power may leave: whole or refused, never wrong",
        power_loss, long=(2000,), short=(300,),
    ),
    "flips": Line(
        "bytes flipped in a checkpoint, an exported student, a manifest and a shard: named, or without effect",
        flips, long=(1,), short=(11,),
    ),
    "soak": Line(
        "runs of four stages in one process: memory, files, threads and step time do not grow",
        soak, long=(60,), short=(0.4,),
    ),
}  # fmt: skip


def run_trust(out: Path, names: Sequence[str], *, short: bool) -> Measured:
    """Go through the lines; what `out` holds of them already is not tried again.

    Raises ConfigError for a line that does not exist. Losses are named in the table `lost` and in `refused`.
    """
    for name in names:
        if name not in LINES:
            raise ConfigError(f"There is no line {name!r}{nearest(name, LINES)}.")
    form, measured = "short" if short else "long", Measured()
    table = measured.tables.setdefault("trust", [])
    for name in names or LINES:
        log = out / f"{name}-{form}.jsonl"
        log.parent.mkdir(parents=True, exist_ok=True)
        trials = _tried(name, form, out, log)
        losses = [fault for trial in trials for fault in trial["faults"]]
        table.append(
            {
                "line": name,
                "what": LINES[name].what,
                "trials": len(trials),
                "lost": sum(bool(trial["faults"]) for trial in trials),
                "minutes": sum(trial["seconds"] for trial in trials) / 60,
            }
        )
        measured.refused += losses[:20]
    return measured


def _tried(name: str, form: str, out: Path, log: Path) -> list[dict]:
    """All trials of a line, those of the log first."""
    known = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    if known and known[-1].get("end"):
        return known[:-1]
    line, before = LINES[name], time.monotonic()
    if name == "soak":
        known = []
    trials = line.tried(out / f"{name}-{form}", len(known), *getattr(line, form))
    with open(log, "a" if known else "w") as file:
        for faults in trials:
            known.append({"faults": faults, "seconds": time.monotonic() - before})
            file.write(json.dumps(known[-1]) + "\n")
            file.flush()
            before = time.monotonic()
        file.write(json.dumps({"end": True}) + "\n")
    return known
