"""What a bench leaves behind: a table on the terminal, JSON and CSV files."""

from __future__ import annotations

import csv
import io
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from stablekd_fast.errors import StableKDError
from stablekd_fast.files import write_atomically
from stablekd_fast.files.reading import read_document
from stablekd_fast.report import machine, versions
from stablekd_fast.report.events import plain
from stablekd_fast.report.page import flat

REQUIRED = ("bench", "case", "contender", "median_seconds", "spread_seconds", "ratio", "baseline")
COMPARED = {"ratio_against": "ratio\nnow/then", "speed_against": "speed\nnow/then"}
"""What a comparison with an earlier file adds to a row, and what it is called in a table."""


def document(content: dict, settings: dict) -> dict:
    """Return the content with machine, versions and settings, and with the commit in a checkout."""
    return {**content, "machine": machine(), "versions": versions(), "settings": {**settings, "commit": commit()}}


def write_document(path: Path, content: dict, settings: dict) -> None:
    write_json(path, document(content, settings))


def write_json(path: Path, found: dict) -> None:
    """Write a document, whole or not at all."""
    write_atomically(Path(path), (json.dumps(plain(found), indent=1, allow_nan=False) + "\n").encode())


def write_csv(path: Path, found: dict) -> None:
    """Write a document's rows, with the columns that any of them has.

    Machine, versions and settings are columns too, the same in every row, so that rows of many files may be put
    together. Raises StableKDError if there are no rows.
    """
    if not found["rows"]:
        raise StableKDError(f"There are no rows for {path}; what this command finds goes to --json and --html.")
    origin = flat({name: found[name] for name in ("machine", "versions", "settings")})
    rows = [{**row, **origin} for row in plain(found)["rows"]]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(Path(path), text.getvalue().encode())


def read_json(path: Path) -> dict:
    """Read a document that `write_json` wrote. Raises StableKDError if it is missing or not such a document."""
    try:
        found = json.loads(read_document(path))
        complete = all(key in row for row in found["rows"] for key in REQUIRED)
    except OSError as error:
        raise StableKDError(f"{path} cannot be read: {error.strerror}. Give the file of an earlier --json.") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise StableKDError(f"{path} is no bench file ({error!r}). Give the file of an earlier --json.") from error
    if not complete:
        raise StableKDError(f"{path} has rows without {', '.join(REQUIRED)}. Give the file of an earlier --json.")
    return found


def by_case(rows: Sequence[dict]) -> list[list[dict]]:
    """Return the rows of each case, in order of first appearance."""
    found: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        found.setdefault((row["bench"], row["case"]), []).append(row)
    return list(found.values())


def table(rows: Sequence[dict]) -> Group:
    """Show the rows of one case under its name."""
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    cells = [cells_of(row) for row in rows]
    for name in dict.fromkeys(name for line in cells for name in line):
        fold = name in ("contender", "of limit")
        style = "bold" if name == "ratio" else ""
        shown.add_column(name, justify="left" if fold else "right", no_wrap=not fold, overflow="fold", style=style)
    for line in cells:
        shown.add_row(*map(Text, line.values()))
    return Group(Text(rows[0]["case"], style="bold"), shown)


def cells_of(row: dict) -> dict[str, str]:
    """Return a row as texts by column: the same columns for all rows of a case."""
    variant = row.get("variant")
    cells = {
        "contender": f"{row['contender']} ({variant})" if variant else row["contender"],
        "ratio": _ratio_text(row),
        "ms": _milliseconds(row["median_seconds"]),
        "± ms": _milliseconds(row["spread_seconds"]),
        "of limit": _limit_text(row),
    }
    for key, name in COMPARED.items():
        if key in row:
            cells[name] = "" if row[key] is None else f"{row[key]:.2f}"
    return cells


def _milliseconds(seconds: float) -> str:
    value = 1e3 * seconds
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _has_own_task(row: dict) -> bool:
    """Tell whether the row measures a limit by work of its own: its time stands beside no other."""
    return row["contender"] == row.get("limit") and "flops" in row


def _ratio_text(row: dict) -> str:
    if _has_own_task(row):
        return ""
    return "baseline" if row["contender"] == row["baseline"] else f"{row['ratio']:.2f}"


def _limit_text(row: dict) -> str:
    if _has_own_task(row):
        return f"{row['gflops_per_second']:.0f} GFLOP/s"
    if row.get("limit") in (None, row["contender"]):
        return ""
    return f"{100 * row['share_of_limit']:.0f} % of {row['limit']}"


def commit() -> str | None:
    """Return the commit of the checkout that this file lies in, with `-dirty` if it was changed; None outside one."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    words = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
