"""The report: one HTML file that needs nothing else, in light and in dark."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

from stablekd_fast.checkpoint import write_atomically
from stablekd_fast.report import palette
from stablekd_fast.report.events import read_events
from stablekd_fast.report.history import History
from stablekd_fast.report.results import read_results
from stablekd_fast.report.style import STYLE_SHEET
from stablekd_fast.report.table import summary_rows


def write_report(
    path: Path, runs: list[dict], events_by_run: dict[str, list[dict]], title: str, *, baseline: str | None = None
) -> None:
    """Write a self-contained report on `runs` to `path`, whole or not at all.

    Args:
        runs: finished runs as in `results.json`.
        events_by_run: the events of each run by a name for people, such as "kd, seed 0"; unfinished runs are welcome.
        baseline: a method to whose mean accuracy the others are compared.

    Raises StableKDError for an unknown baseline and TrainingError if the file cannot be written.
    """
    histories = [History.from_events(label, events) for label, events in events_by_run.items()]
    methods = list(dict.fromkeys([run["method"] for run in runs] + [history.method for history in histories]))
    sections = [
        _headline(runs, methods, baseline),
        _accuracy(histories, methods),
        _losses(histories),
        _merges(histories),
        _settings(histories),
        _origin(histories),
    ]
    shown = _blocks_of(_staged(histories))
    page = PAGE.format(
        title=escape(title),
        style=STYLE_SHEET.strip(),
        colours=_colour_variables(palette.method_colours(methods), palette.block_colours(len(shown))),
        body="\n".join(section for section in sections if section),
    )
    write_atomically(Path(path), page.encode())


def write_run_report(run_dir: Path) -> None:
    """Write `run_dir/report.html` from the results and events that a finished run left there."""
    run_dir = Path(run_dir)
    runs = read_results(run_dir / "results.json")["runs"]
    label = ", ".join(f"{run['method']}, seed {run['seed']}" for run in runs)
    write_report(run_dir / "report.html", runs, {label: read_events(run_dir)}, f"Distillation run: {label}")


NAMES_A_RUN = ("method", "seed", "out")
"""Settings that tell runs apart rather than say how they were trained."""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
{style}
{colours}
</style>
</head>
<body>
<main>
<h1>{title}</h1>
{body}
</main>
</body>
</html>
"""


# Sections. Each returns HTML, or nothing where the runs have nothing to show.


def _headline(runs: list[dict], methods: list[str], baseline: str | None) -> str:
    if not runs:
        return "<p>No run has finished yet.</p>"
    from stablekd_fast.report import plots  # matplotlib is slow to import, and only a report needs it

    rows = summary_rows(runs, baseline)
    cells = [
        [_chip(f"--method-{methods.index(row['method'])}", row["method"]), *(escape(v) for v in list(row.values())[1:])]
        for row in rows
    ]
    accuracies = {row["method"]: [run["accuracy"] for run in runs if run["method"] == row["method"]] for row in rows}
    notes = "Test split, last weights. Mean ± sample standard deviation over runs; one dot per run, a bar at the mean."
    if baseline is not None:
        notes += f" Differences to {escape(baseline)} are in percentage points."
    table = _table(list(rows[0]), cells, numbers=True, emphasised="accuracy %")
    return _section("Accuracy", notes, table + _figure(plots.accuracy_dots(accuracies)))


def _accuracy(histories: list[History], methods: list[str]) -> str:
    split = next((s for s in ("validation", "test") if any(len(h.accuracy(s)) > 1 for h in histories)), None)
    if split is None:
        return ""
    from stablekd_fast.report import plots

    shown = [m for m in methods if any(h.method == m and h.accuracy(split) for h in histories)]
    legend = _legend([(f"--method-{methods.index(method)}", method) for method in shown])
    notes = "Thin: one run. Bold: mean over runs. Dashed: blocks merge."
    figure = _figure(plots.accuracy_curves(histories, methods, split))
    return _section(f"{split.capitalize()} accuracy over epochs", notes, legend + figure)


def _losses(histories: list[History]) -> str:
    history = _staged(histories)
    if history is None or not history.train:
        return ""
    from stablekd_fast.report import plots

    groups: dict[int, list[str]] = {}
    for _, group in history.losses():
        names = groups.setdefault(plots.last_block(group), [])
        if group not in names:
            names.append(group)
    legend = _legend([(f"--block-{block}", ", then ".join(names)) for block, names in sorted(groups.items())])
    notes = (
        f"Run: {escape(history.label)}. One line per group of blocks, in the colour of its last block; "
        "1+2 is the group of the merged blocks 1 and 2. "
        "Losses of different groups have different terms; compare each with itself."
    )
    return _section("Training loss by group", notes, legend + _figure(plots.loss_curves(history)))


def _merges(histories: list[History]) -> str:
    rows = []
    for history in histories:
        names = {stage["stage"]: stage["name"] for stage in history.stages}
        for merge in history.merges:
            stage = merge["stage"]
            epoch = merge.get("merge_step", merge["step"]) / history.steps_per_epoch
            recovered = merge["steps_until_recovered"]
            rows.append(
                [
                    escape(history.label),
                    f"{epoch:.2f}",
                    escape(f"{names.get(stage - 1, '?')} → {names.get(stage, '?')}"),
                    _lines(merge["exposure_gap"], "×{:.2f}"),
                    _lines(merge["loss_at_merge"], "{:.4g}"),
                    "not within the stage" if recovered is None else f"{recovered} steps",
                    _value(merge["max_output_difference"]),
                ]
            )
    if not rows:
        return ""
    header = ["run", "epoch", "groups", "exposure gap", "loss at merge", "recovered after", "output difference"]
    notes = (
        "Exposure gap: loss at a cut when the student's own activation feeds the blocks before it, divided by the loss "
        "when the teacher's does; 1 is no gap. Recovered: when the merged loss is below its value at the merge. "
        "Output difference: largest change of the composed student's outputs by merging; 0 is expected."
    )
    return _section("Merges", notes, _table(header, rows))


def _settings(histories: list[History]) -> str:
    configured = [(history, _flat(history.start["config"])) for history in histories if "config" in history.start]
    if not configured:
        return ""
    configs = [config for _, config in configured]
    keys = [key for key in dict.fromkeys(key for config in configs for key in config) if key not in NAMES_A_RUN]
    shared = [key for key in keys if all(config.get(key) == configs[0].get(key) for config in configs)]
    differing = [key for key in keys if key not in shared]
    body = _pairs({key: _value(configs[0].get(key)) for key in shared})
    if differing:
        seeds: dict[tuple[str, ...], list[str]] = {}
        for history, config in configured:
            row = (escape(history.method), *(_value(config.get(key)) for key in differing))
            seeds.setdefault(row, []).append(_value(history.seed))
        rows = [[row[0], ", ".join(of_row), *row[1:]] for row, of_row in seeds.items()]
        table = _table(["method", "seeds", *differing], rows)
        body = f"<h3>Where runs differ</h3>{table}<h3>Shared by all runs</h3>{body}"
    return _section("Settings", "", body)


def _origin(histories: list[History]) -> str:
    parts = ""
    for name in ("machine", "versions"):
        found: dict[str, list[str]] = {}
        for history in histories:
            for key, value in history.start.get(name, {}).items():
                text = f"{value / 2**30:.1f} GiB" if key == "memory_bytes" and value else _value(value)
                if text not in found.setdefault(key, []):
                    found[key].append(text)
        if found:
            labels = {key: key.removesuffix("_bytes") for key in found}
            parts += f"<h3>{name.capitalize()}</h3>" + _pairs({labels[k]: " / ".join(v) for k, v in found.items()})
    return _section("Where it ran", "", parts) if parts else ""


def _staged(histories: list[History]) -> History | None:
    """The run whose losses are shown: the first with merges, or else the first."""
    return next((h for h in histories if len(h.stages) > 1), histories[0] if histories else None)


def _blocks_of(history: History | None) -> list[int]:
    if history is None:
        return []
    return sorted({block for stage in history.stages for group in stage["groups"] for block in group})


# Pieces of HTML. Arguments called `html` or holding cells are escaped already.


def _section(title: str, notes: str, html: str) -> str:
    note = f'<p class="note">{notes}</p>' if notes else ""
    return f"<section>\n<h2>{escape(title)}</h2>\n{note}\n{html}\n</section>"


def _table(header: list[str], rows: list[list[str]], *, numbers: bool = False, emphasised: str | None = None) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    strong = [' class="strong"' if name == emphasised else "" for name in header]
    body = "".join(f"<tr>{''.join(f'<td{s}>{cell}</td>' for s, cell in zip(strong, row))}</tr>\n" for row in rows)
    kind = ' class="numbers"' if numbers else ""
    return f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'


def _pairs(values: dict[str, str]) -> str:
    items = "".join(f"<div><dt>{escape(key)}</dt><dd>{html}</dd></div>\n" for key, html in values.items())
    return f"<dl>\n{items}</dl>"


def _figure(svg: str) -> str:
    return f'<div class="scroll"><figure>{svg}</figure></div>'


def _legend(entries: list[tuple[str, str]]) -> str:
    return f'<p class="legend">{"".join(_chip(variable, text) for variable, text in entries)}</p>'


def _chip(variable: str, text: str) -> str:
    return f'<span class="chip"><i style="background: var({variable})"></i>{escape(text)}</span>'


def _lines(values: dict[str, float | None], form: str) -> str:
    texts = (f"{name}: {'not finite' if value is None else form.format(value)}" for name, value in values.items())
    return "<br>".join(map(escape, texts))


def _value(value: Any) -> str:
    """A setting or a measure as escaped text."""
    if value is None or value == [] or value == {}:
        return "–"
    if isinstance(value, float):
        return f"{value:.6g}"
    return escape(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _flat(values: dict, prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _colour_variables(methods: list[tuple[str, str]], blocks: list[tuple[str, str]]) -> str:
    def rules(side: int) -> str:
        families = (("method", methods), ("block", blocks))
        return " ".join(f"--{name}-{i}: {pair[side]};" for name, pairs in families for i, pair in enumerate(pairs))

    return f":root {{ {rules(0)} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {rules(1)} }} }}"
