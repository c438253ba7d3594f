"""The page of a bench: a plot and a table for each case, further tables, and where it was measured."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from stablekd_fast.bench.output import by_case, cells_of
from stablekd_fast.report import page, palette

KINDS = ("ours", "rival", "baseline", "limit")
"""What the colours of a plot mean, in the order of `palette.BENCH`."""


def write_bench_report(path: Path, found: dict, warnings: Sequence[str] = ()) -> None:
    """Write the page of a document (`bench.output.document`), whole or not at all.

    `warnings`: where the earlier run that it is compared with differs. Raises TrainingError if the file cannot be
    written.
    """
    cases = by_case(found["rows"])
    sections = [
        _head(found, warnings),
        _summary(cases),
        *(_case(number, rows) for number, rows in enumerate(cases)),
        *(_further(title, rows) for title, rows in found.get("tables", {}).items() if rows),
        page.origin({name: [found.get(name, {})] for name in ("settings", "machine", "versions")}),
    ]
    command = (
        found.get("settings", {}).get("command") or f"stablekd bench {' '.join(rows[0]['bench'] for rows in cases[:1])}"
    )
    page.write_page(path, " ".join(command.split()[:3]), sections, {"bench": list(palette.BENCH)})


def _head(found: dict, warnings: Sequence[str]) -> str:
    command, commit = (found.get("settings", {}).get(name) for name in ("command", "commit"))
    html = f"<p><code>{escape(command)}</code></p>" if command else ""
    where = [found.get("machine", {}).get("cpu"), *found.get("machine", {}).get("gpus", [])]
    versions = found.get("versions", {})
    where += [
        f"torch {versions['torch']}" if "torch" in versions else None,
        f"commit {commit[:12]}" if commit else None,
    ]
    html += f'<p class="note">{escape(", ".join(text for text in where if text))}</p>'
    if warnings:
        items = "".join(f"<li>{escape(text)}</li>" for text in warnings)
        note = "The earlier run differs. Ratios were taken within each run; times do not compare:"
        html += f'<p class="note">{note}</p><ul class="note">{items}</ul>'
    return html


def _summary(cases: Sequence[list[dict]]) -> str:
    """Return a section with the fastest of ours in each case, against the baseline and the fastest rival."""
    lines = [_summary_line(rows) for rows in cases]
    lines = [line for line in lines if line is not None]
    if len(lines) < 2:
        return ""
    cells = [[escape(text) for text in line.values()] for line in lines]
    notes = "The fastest of ours, and how many times less time it takes than the baseline and than the fastest rival."
    return page.section("Summary", notes, page.table(list(lines[0]), cells, numbers=True, emphasised="vs baseline"))


def _summary_line(rows: Sequence[dict]) -> dict[str, str] | None:
    best, rival = (
        min((row for row in rows if row.get("role") == role), key=lambda row: row["median_seconds"], default=None)
        for role in ("ours", "rival")
    )
    if best is None:
        return None
    return {
        "case": rows[0]["case"],
        "fastest of ours": best["contender"],
        "vs baseline": f"{best['ratio']:.2f}",
        "vs fastest rival": f"{best['ratio'] / rival['ratio']:.2f} ({rival['contender']})" if rival else "",
        "of limit": cells_of(best)["of limit"],
    }


def _case(number: int, rows: Sequence[dict]) -> str:
    from stablekd_fast.report import plots  # matplotlib is slow to import, and only a page needs it

    bars = [_bar(row) for row in rows if row["contender"] != row.get("limit") or _kind(row) == "baseline"]
    shown = {bar["colour"] for bar in bars} | {KINDS.index("limit") for bar in bars if bar["limit_seconds"] is not None}
    legend = page.legend([(f"--bench-{kind}", KINDS[kind]) for kind in sorted(shown)])
    figure = page.figure(plots.timing_bars(bars, f"case-{number}")) if bars else ""
    lines = [{name.replace("\n", " "): text for name, text in cells_of(row).items()} for row in rows]
    cells = [[escape(text) for text in line.values()] for line in lines]
    table = page.table(list(lines[0]), cells, numbers=True, emphasised="ratio")
    notes = (
        f"Ratio: time of {escape(rows[0]['baseline'])} / own time, median over rounds. ±: half the interquartile range."
    )
    return page.section(rows[0]["case"], notes, legend + figure + table)


def _kind(row: dict) -> str:
    """Return what a contender is shown as. A baseline that is the limit as well is shown as the baseline."""
    return "baseline" if row["contender"] == row["baseline"] else row.get("role", "rival")


def _bar(row: dict) -> dict:
    cells = cells_of(row)
    ratio = "" if _kind(row) == "baseline" else f" · {cells['ratio']}×"
    return {
        "label": row["contender"],
        "note": f"{cells['ms']} ms{ratio}",
        "colour": KINDS.index(_kind(row)),
        "limit_seconds": row.get("limit_seconds"),
        "median_seconds": row["median_seconds"],
        "spread_seconds": row["spread_seconds"],
    }


def _further(title: str, rows: Sequence[dict]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[page.value(row.get(name)) for name in names] for row in rows]
    return page.section(
        title[:1].upper() + title[1:], "", page.table([name.replace("_", " ") for name in names], cells, numbers=True)
    )
