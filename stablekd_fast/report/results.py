"""`results.json`: what runs reached, where, and with which versions."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from stablekd_fast.errors import StableKDError
from stablekd_fast.files import write_atomically
from stablekd_fast.files.reading import check_format, read_document
from stablekd_fast.report.events import plain
from stablekd_fast.report.machine import machine, versions
from stablekd_fast.report.measures import MEASURES, measure_of

FORMAT = 1
"""Files without one are those of versions before."""
REQUIRED = ("method", "seed", "epochs", "steps", "images_per_second", "wall_seconds")


def write_results(path: Path, runs: list[dict], **extra: Any) -> None:
    """Write `{"format": …, "runs": …, "machine": …, "versions": …}` and the entries `extra` to `path`, whole or not at
    all.

    A run holds at least the keys in `REQUIRED` and one of `MEASURES`, which is that of the test split.
    Raises StableKDError if a run does not, and TrainingError if the file cannot be written.
    """
    for index, run in enumerate(runs):
        _check(run, index)
    document = plain({"format": FORMAT, "runs": runs, "machine": machine(), "versions": versions(), **extra})
    write_atomically(Path(path), (json.dumps(document, indent=2, allow_nan=False) + "\n").encode())


def read_results(path: Path) -> dict:
    """The document that `write_results` wrote. Raises StableKDError if it is missing or not such a document."""
    try:
        document = json.loads(read_document(path))
        runs, form = list(document["runs"]), document.get("format", FORMAT)
    except OSError as error:
        raise StableKDError(
            f"{path} cannot be read: {error.strerror}. Give the results.json of a finished run."
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise StableKDError(f"{path} is not a results file ({error!r}). Give the results.json of a run.") from error
    check_format(str(path), form, FORMAT, StableKDError, "Read it with the one that wrote it.")
    for index, run in enumerate(runs):
        _check(run, index)
    return document


def summarise(runs: list[dict]) -> list[dict]:
    """One row per method, in order of first appearance.

    A row has the `count` of runs; `mean`, `std` (sample standard deviation, None for a single run), `min` and `max` of
    the accuracy, 0 to 1, or of the cosine; means of `epochs`, `images_per_second` and `wall_seconds`.
    """
    by_method: dict[str, list[dict]] = {}
    for run in runs:
        by_method.setdefault(run["method"], []).append(run)
    rows, measure = [], measure_of(runs)
    for method, group in by_method.items():
        accuracies = [run[measure] for run in group]
        row = {
            "method": method,
            "count": len(group),
            "mean": statistics.fmean(accuracies),
            "std": statistics.stdev(accuracies) if len(group) > 1 else None,
            "min": min(accuracies),
            "max": max(accuracies),
        }
        for name in ("epochs", "images_per_second", "wall_seconds"):
            row[name] = statistics.fmean(run[name] for run in group)
        rows.append(row)
    return rows


def _check(run: dict, index: int) -> None:
    measure = measure_of([run]) if isinstance(run, dict) else ""
    if not measure or not hasattr(run.get(measure, 0.0), "__float__"):
        raise StableKDError(
            f"Run {index} is {run!s:.60}; a run in results.json has names, and its {measure or 'accuracy'} is a number."
        )
    missing = [key for key in (*REQUIRED[:2], measure, *REQUIRED[2:]) if key not in run]
    if missing:
        raise StableKDError(
            f"Run {index} lacks {', '.join(missing)}; it has {', '.join(run) or 'nothing'}. "
            f"A run in results.json needs {', '.join(REQUIRED)}, and accuracy or cosine."
        )
    low, high = MEASURES[measure]
    if not low <= run[measure] <= high:
        what = "a share of images" if measure == "accuracy" else "a value"
        raise StableKDError(
            f"Run {index} ({run['method']}, seed {run['seed']}) has the {measure} {run[measure]}; "
            f"give {what} between {low:g} and {high:g}, not percent."
        )
