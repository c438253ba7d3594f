"""What a bench leaves behind: a table on the terminal, JSON and CSV files, and comparisons with an earlier file."""

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

from stablekd_fast.checkpoint import write_atomically
from stablekd_fast.errors import StableKDError
from stablekd_fast.report import machine, versions
from stablekd_fast.report.events import plain

REQUIRED = ("bench", "case", "contender", "median_seconds", "spread_seconds", "ratio", "baseline")


def write_json(path: Path, rows: Sequence[dict], settings: dict) -> None:
    """Write rows, machine, versions and settings (with the commit, in a checkout), whole or not at all."""
    write_document(path, {"rows": rows}, settings)


def write_document(path: Path, content: dict, settings: dict) -> None:
    """Write the content with machine, versions and settings (with the commit, in a checkout), whole or not at all."""
    document = {
        **content,
        "machine": machine(),
        "versions": versions(),
        "settings": {**settings, "commit": commit()},
    }
    write_atomically(Path(path), (json.dumps(plain(document), indent=1, allow_nan=False) + "\n").encode())


def write_csv(path: Path, rows: Sequence[dict]) -> None:
    """Write the rows, with the columns that any of them has."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(Path(path), text.getvalue().encode())


def read_json(path: Path) -> dict:
    """The document that `write_json` wrote. Raises StableKDError if it is missing or not such a document."""
    try:
        document = json.loads(Path(path).read_bytes())
        complete = all(key in row for row in document["rows"] for key in REQUIRED)
    except OSError as error:
        raise StableKDError(f"{path} cannot be read: {error.strerror}. Give the file of an earlier --json.") from error
    except (ValueError, TypeError, KeyError) as error:
        raise StableKDError(f"{path} is no bench file ({error!r}). Give the file of an earlier --json.") from error
    if not complete:
        raise StableKDError(f"{path} has rows without {', '.join(REQUIRED)}. Give the file of an earlier --json.")
    return document


def compare(rows: Sequence[dict], earlier: Sequence[dict]) -> list[dict]:
    """The rows, each with `against`: its earlier median time / its time now; None for a row that is new."""
    before = {_key(row): row["median_seconds"] for row in earlier}
    found = ((row, before.get(_key(row))) for row in rows)
    return [{**row, "against": seconds and seconds / row["median_seconds"]} for row, seconds in found]


def below(rows: Sequence[dict], contender: str, ratio: float) -> list[dict]:
    """The rows of `contender` whose ratio to the baseline is less than `ratio`."""
    return [row for row in rows if row["contender"] == contender and row["ratio"] < ratio]


def table(rows: Sequence[dict]) -> Group:
    """The rows of one case under its name. `earlier` is the time in an earlier file over the time now."""
    compared = any("against" in row for row in rows)
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    shown.add_column("contender", overflow="fold")
    for name in ["ratio", "ms", "± ms", "of floor", *(["earlier"] if compared else [])]:
        shown.add_column(name, justify="right", no_wrap=True, style="bold" if name == "ratio" else "")
    for row in rows:
        shown.add_row(*map(Text, _cells(row, compared)))
    return Group(Text(rows[0]["case"], style="bold"), shown)


def _cells(row: dict, compared: bool) -> list[str]:
    share, against = row.get("share_of_floor"), row.get("against")
    cells = [
        f"{row['contender']} ({row['variant']})" if row.get("variant") else row["contender"],
        "baseline" if row["contender"] == row["baseline"] else f"{row['ratio']:.2f}",
        f"{1e3 * row['median_seconds']:.3g}",
        f"{1e3 * row['spread_seconds']:.2g}",
        "" if share is None else f"{100 * share:.0f} %",
    ]
    return [*cells, "" if against is None else f"{against:.2f}"] if compared else cells


def commit() -> str | None:
    """The commit of the checkout that this file lies in, with `-dirty` for one that was changed; None outside one."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    words = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _key(row: dict) -> tuple[str, str, str]:
    return row["bench"], row["case"], row["contender"]
