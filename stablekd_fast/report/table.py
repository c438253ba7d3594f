"""The comparison of methods as a table: for a terminal, as plain text, as markdown."""

from __future__ import annotations

from rich import box
from rich.table import Table
from rich.text import Text

from stablekd_fast.errors import StableKDError
from stablekd_fast.report.measures import measure_of
from stablekd_fast.report.results import summarise


def summary_rows(runs: list[dict], baseline: str | None = None) -> list[dict[str, str]]:
    """One row of readable texts per method; accuracies in percent, differences to `baseline` in percentage points;
    cosines, of students without a classifier, as they are.

    The spread after ± is the sample standard deviation over runs. Raises StableKDError if no run has the baseline's
    method.
    """
    summaries = summarise(runs)
    means = {summary["method"]: summary["mean"] for summary in summaries}
    if baseline is not None and baseline not in means:
        raise StableKDError(f"The baseline {baseline!r} is not among the methods: {', '.join(means) or 'no runs'}.")
    rows, measure = [], measure_of(runs)
    unit, scale, digits = (" %", 100, 2) if measure == "accuracy" else ("", 1, 4)
    for summary in summaries:
        mean = with_spread(summary, scale, digits)
        row = {"method": summary["method"], "runs": str(summary["count"]), f"{measure}{unit}": mean}
        if baseline is not None:
            same = summary["method"] == baseline
            row[f"vs {baseline}"] = "" if same else f"{scale * (summary['mean'] - means[baseline]):+.{digits}f}"
        row[f"range{unit}"] = "–".join(f"{scale * summary[end]:.{digits - 1}f}" for end in ("min", "max"))
        row["images/s"] = f"{summary['images_per_second']:,.0f}"
        row["time"] = duration(summary["wall_seconds"])
        rows.append(row)
    return rows


def summary_table(runs: list[dict], baseline: str | None = None, title: str = "Test accuracy") -> Table:
    """The rows of `summary_rows` as a rich table."""
    rows = summary_rows(runs, baseline)
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    for name in rows[0] if rows else ():
        table.add_column(Text(name), justify="left" if name == "method" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row.values()))  # Text: a method's name is no markup
    return table


def summary_text(runs: list[dict], baseline: str | None = None, *, markdown: bool = False) -> str:
    """The rows of `summary_rows` in aligned columns, or as a markdown table. Empty if there are no runs."""
    rows = summary_rows(runs, baseline)
    if not rows:
        return ""
    header = list(rows[0])
    cells = [header] + [[value.replace("|", r"\|") if markdown else value for value in row.values()] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    padded = [[f"{line[0]:<{widths[0]}}", *(f"{c:>{w}}" for c, w in zip(line[1:], widths[1:]))] for line in cells]
    if not markdown:
        return "\n".join("  ".join(line).rstrip() for line in padded)
    rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [padded[0], rule, *padded[1:]])


def with_spread(summary: dict, scale: float, digits: int) -> str:
    """A mean ± standard deviation, times `scale`; a single run has no spread to show."""
    mean = f"{scale * summary['mean']:.{digits}f}"
    return mean if summary["std"] is None else f"{mean} ± {scale * summary['std']:.{digits}f}"


def duration(seconds: float) -> str:
    """A duration as text: `42.0 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"
