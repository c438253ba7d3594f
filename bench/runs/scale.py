"""Images per second on several ranks of one machine, from a full cache: `python -m stablekd_fast.bench.runs.scale`.

Every run is a real `distill` under torchrun, one thread per rank, on the same rows. Where ranks divide blocks, losses
must be those of one rank to the last bit, where they divide images nearly, before any speed is shown.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from stablekd_fast.bench.output import write_document
from stablekd_fast.errors import StableKDError
from stablekd_fast.report import read_events
from stablekd_fast.report.terminal import print_rows

_DIVIDED = 0.1
"""By so much, relatively, losses may differ where images are divided: batch-norm statistics are those of a part."""


def run_scale(
    settings: Sequence[str], ranks: Sequence[int], rounds: int, folder: Path, show: Callable[[str, list[dict]], None]
) -> list[dict]:
    """Return rows of images/s per stage and number of ranks, with the ratio to the first number's.

    They are medians over rounds, which take the numbers of ranks in turn.

    Args:
        settings: options of `stablekd distill`, but for `--out` and the cache's folder.
        folder: where runs and rows are put.

    Raises StableKDError if a run fails, or if one trains something else than the others.
    """
    rows_folder = folder / "rows"
    common = [*settings, "--cache.directory", str(rows_folder), "--cache.plan", "all"]
    _start(1, ["cache", "build", *common, "--out", str(folder / "build")])
    speeds: dict[tuple[int, int], list[float]] = {}
    known: dict[int, list[dict]] = {}
    found = []
    for number in range(rounds):
        for count in ranks if number % 2 == 0 else reversed(ranks):
            out = folder / f"round{number}-ranks{count}"
            _start(count, ["distill", *common, "--out", str(out)])
            events = read_events(out)
            meshes = {event["stage"]: event for event in events if event["kind"] == "ranks"}
            for stage, trained in enumerate(_stages(events)):
                divided = stage in meshes and meshes[stage]["mesh"]["data"] > 1
                check_losses(known.setdefault(stage, trained), trained, count, _DIVIDED if divided else 0.0)
                speeds.setdefault((stage, count), []).append(trained[-1]["images_per_second"])
            for stage, event in meshes.items():
                found += [
                    {"round": number, "count": count, "stage": stage, "mesh": event["mesh"], **row}
                    for row in event["ranks"]
                ]
    rows = list(_rows(speeds, ranks))
    show("images per second", rows)
    if found:
        show("ranks", found)
    return [*rows, *({"bench": "scale", "case": "rank", **row} for row in found)]


def check_losses(first: list[dict], other: list[dict], count: int, tolerance: float) -> None:
    """Raise StableKDError unless a stage's losses are those of the first run, up to a relative `tolerance`."""
    for a, b in zip(first, other):
        for name, loss in a["losses"].items():
            if not math.isclose(loss, b["losses"][name], rel_tol=tolerance):
                raise StableKDError(
                    f"On {count} ranks the loss of blocks {name} at step {a['step']} is {b['losses'][name]}, in the "
                    f"first run {loss}: no speed is shown."
                )


def _stages(events: list[dict]) -> Iterator[list[dict]]:
    """Yield the logged steps of each stage."""
    starts = [event for event in events if event["kind"] == "stage_start"]
    for start in starts:
        yield [e for e in events if e["kind"] == "train" and start["first_step"] < e["step"] <= start["last_step"]]


def _rows(speeds: dict[tuple[int, int], list[float]], ranks: Sequence[int]) -> Iterator[dict]:
    for (stage, count), values in sorted(speeds.items()):
        ratios = [speed / alone for speed, alone in zip(values, speeds[stage, ranks[0]])]
        yield {
            "bench": "scale",
            "case": f"stage {stage + 1}",
            "contender": f"{count} rank(s)",
            "images_per_second": statistics.median(values),
            "lowest": min(values),
            "highest": max(values),
            "ratio": statistics.median(ratios),
            "lowest_ratio": min(ratios),
            "highest_ratio": max(ratios),
            "baseline": f"{ranks[0]} rank(s)",
        }


def _start(ranks: int, words: list[str]) -> None:
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *launcher, "-m", "stablekd_fast", *words]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}, capture_output=True, text=True
    )
    if done.returncode:
        raise StableKDError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="What is not listed here goes to `stablekd distill`: --data, --teacher, --student, --batch-size ...",
    )
    parser.add_argument(
        "--ranks", default="1,2", help="numbers of ranks; the first is what the others are compared with"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", required=True, help="for runs and rows")
    parser.add_argument("--json", help="file for the rows")
    own, settings = parser.parse_known_args(words)
    ranks = [int(count) for count in own.ranks.split(",")]
    rows = run_scale(settings, ranks, own.rounds, Path(own.folder), print_rows)
    if own.json:
        write_document(
            Path(own.json), {"rows": rows}, {"settings": settings, "rounds": own.rounds, "threads_per_rank": 1}
        )


if __name__ == "__main__":
    main()
