"""Compares a bench's rows with those of an earlier file: what changed, and what fell too far."""

from __future__ import annotations

from collections.abc import Sequence

from stablekd_fast.errors import StableKDError
from stablekd_fast.report.page import flat

OF_ONE_RUN = ("settings.commit", "settings.command", "settings.load_average")
"""Settings that may differ between two runs that are alike."""


def compare(rows: Sequence[dict], earlier: Sequence[dict]) -> list[dict]:
    """Return the rows, each compared with the earlier one of the same bench, case and contender.

    `ratio_against` is the ratio to the baseline now over the ratio then: each was taken within one run, so it holds
    when the machine was slower or is another one. `speed_against` is the time then over the time now. Both are None for
    a new row; the first also if the baseline was another.
    """
    before = {_key(row): row for row in earlier}
    return [{**row, **_against(row, before.get(_key(row)))} for row in rows]


def _against(row: dict, then: dict | None) -> dict:
    if then is None:
        return {"ratio_against": None, "speed_against": None}
    same = row["baseline"] == then["baseline"]
    return {
        "ratio_against": row["ratio"] / then["ratio"] if same else None,
        "speed_against": then["median_seconds"] / row["median_seconds"],
    }


def _key(row: dict) -> tuple[str, str, str]:
    return row["bench"], row["case"], row["contender"]


def differences(now: dict, then: dict) -> list[str]:
    """Say where machines, versions and settings of two documents differ."""
    new, old = (
        flat({name: found.get(name, {}) for name in ("machine", "versions", "settings")}) for found in (now, then)
    )
    shared = [key for key in new if key in old and key not in OF_ONE_RUN]
    return [f"{key} was {old[key]}, is {new[key]}" for key in shared if new[key] != old[key]]


def fallen(rows: Sequence[dict], least: float) -> list[str]:
    """Say which rows of this project's own contenders are below `least`.

    Rows that were compared go by `ratio_against`, others by their ratio to the baseline. Raises StableKDError if there
    is no such row: a check of nothing must not pass.
    """
    key = "ratio_against" if any("ratio_against" in row for row in rows) else "ratio"
    ours = [row for row in rows if row.get("role") == "ours" and row["contender"] != row["baseline"]]
    watched = [row for row in ours if row.get(key) is not None]
    if not watched:
        raise StableKDError(
            f"No row can be held to --fail-below {least:g}; --against a file of the same bench and cases."
        )
    what = "of its earlier ratio to" if key == "ratio_against" else "times"
    return [
        f"{row['case']}: {row['contender']} is at {row[key]:.2f} {what} {row['baseline']}, below {least:g}"
        for row in watched
        if row[key] < least
    ]
