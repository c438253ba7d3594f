"""The report on runs: accuracy, losses, merges, settings, and where they ran."""

from __future__ import annotations

from html import escape
from pathlib import Path

from stablekd_fast.report import page, palette
from stablekd_fast.report.events import read_events
from stablekd_fast.report.history import History
from stablekd_fast.report.measures import measure_of
from stablekd_fast.report.results import read_results, summarise
from stablekd_fast.report.table import summary_rows


def write_report(
    path: Path,
    runs: list[dict],
    events_by_run: dict[str, list[dict]],
    title: str,
    *,
    baseline: str | None = None,
    about: str | None = None,
) -> None:
    """Write a self-contained report on `runs` to `path`, whole or not at all.

    Args:
        runs: finished runs as in `results.json`.
        events_by_run: the events of each run by a name for people, such as "kd, seed 0"; unfinished runs are welcome.
        baseline: a method; the mean accuracies of other methods are compared with its own.
        about: what the runs have in common, in a few words. The page then opens with what was found, in a sentence, and
            a picture of accuracy over seconds.

    Raises StableKDError for an unknown baseline and TrainingError if the file cannot be written.
    """
    histories = [History.from_events(label, events) for label, events in events_by_run.items()]
    methods = list(dict.fromkeys([run["method"] for run in runs] + [history.method for history in histories]))
    sections = [
        _opening(runs, histories, methods, about) if about else "",
        _headline(runs, methods, baseline),
        _reached(histories, methods),
        _losses(histories),
        _merges(histories),
        _settings(histories),
        _origin(histories),
    ]
    colours = {
        "method": palette.method_colours(methods),
        "block": palette.block_colours(len(_blocks_of(_staged(histories)))),
    }
    page.write_page(path, title, sections, colours)


def write_run_report(run_dir: Path) -> None:
    """Write `run_dir/report.html` from the results and events that a finished run left there."""
    run_dir = Path(run_dir)
    runs = read_results(run_dir / "results.json")["runs"]
    label = ", ".join(f"{run['method']}, seed {run['seed']}" for run in runs)
    write_report(run_dir / "report.html", runs, {label: read_events(run_dir)}, f"Distillation run: {label}")


NAMES_A_RUN = ("method", "seed", "out")
"""Settings that tell runs apart rather than say how they were trained."""

# Sections. Each returns HTML, or nothing where the runs have nothing to show.


def _opening(runs: list[dict], histories: list[History], methods: list[str], about: str) -> str:
    from stablekd_fast.report import plots

    split = next((s for s in ("validation", "test") if any(len(h.reached(s)) > 1 for h in histories)), "test")
    shown = [m for m in methods if any(h.method == m and h.reached_over_seconds(split) for h in histories)]
    if not runs or not shown:
        return ""
    legend = page.legend([(f"--method-{methods.index(method)}", method) for method in shown])
    measure = measure_of(runs)
    notes = f"The picture: {split} {measure} while training. Thin: one run. Bold: mean over runs."
    figure = page.figure(plots.measure_over_seconds(histories, methods, split, measure))
    return page.section(found_in(runs, about), notes, legend + figure)


def found_in(runs: list[dict], about: str) -> str:
    """What runs found, in a sentence: which method's students are best, after how long, and how far the others are."""
    rows = sorted(summarise(runs), key=lambda row: row["mean"], reverse=True)
    said = [
        f"{'' if row is rows[0] else row['method'] + ' '}{100 * row['mean']:.1f}%"
        + (f" ± {100 * row['std']:.1f}" if row["std"] is not None else "")
        + f" in {row['wall_seconds']:.0f} s"
        for row in rows
    ]
    lead = f"{about}: students trained by {rows[0]['method']} got the most test images right, {said[0]}"
    return f"{lead}; {', '.join(said[1:])}." if len(said) > 1 else f"{lead}."


def _headline(runs: list[dict], methods: list[str], baseline: str | None) -> str:
    if not runs:
        return "<p>No run has finished yet.</p>"
    from stablekd_fast.report import plots  # matplotlib is slow to import, and only a report needs it

    rows = summary_rows(runs, baseline)
    cells = [
        [
            page.chip(f"--method-{methods.index(row['method'])}", row["method"]),
            *(escape(v) for v in list(row.values())[1:]),
        ]
        for row in rows
    ]
    measure = measure_of(runs)
    values = {row["method"]: [run[measure] for run in runs if run["method"] == row["method"]] for row in rows}
    notes = "Test split, last weights. Mean ± sample standard deviation over runs; one dot per run, a bar at the mean."
    if any(run.get("truth") == "teacher" for run in runs):
        notes += (
            " These images have no labels: accuracy is how often student and teacher have the same first class, and "
            "the loss is held against the teacher's first class."
        )
    if baseline is not None:
        unit = " are in percentage points" if measure == "accuracy" else " are those of the cosine"
        notes += f" Differences to {escape(baseline)}{unit}."
    if measure == "cosine":
        notes += " The cosine is that of the student's embedding, mapped to the teacher's width, with the teacher's."
    table = page.table(list(rows[0]), cells, numbers=True, emphasised=list(rows[0])[2])
    return page.section(_titled(measure), notes, table + page.figure(plots.dots(values, measure)))


def _titled(measure: str) -> str:
    return "Accuracy" if measure == "accuracy" else "Cosine with the teacher's embedding"


def _reached(histories: list[History], methods: list[str]) -> str:
    split = next((s for s in ("validation", "test") if any(len(h.reached(s)) > 1 for h in histories)), None)
    if split is None:
        return ""
    from stablekd_fast.report import plots

    shown = [m for m in methods if any(h.method == m and h.reached(split) for h in histories)]
    legend = page.legend([(f"--method-{methods.index(method)}", method) for method in shown])
    notes = "Thin: one run. Bold: mean over runs. Dashed: blocks merge."
    measure = measure_of([event for history in histories for event in history.evaluations])
    figure = page.figure(plots.curves(histories, methods, split, measure))
    return page.section(f"{split.capitalize()} {measure} over epochs", notes, legend + figure)


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
    legend = page.legend([(f"--block-{block}", ", then ".join(names)) for block, names in sorted(groups.items())])
    notes = (
        f"Run: {escape(history.label)}. One line per group of blocks, in the colour of its last block; "
        "1+2 is the group of the merged blocks 1 and 2. "
        "Losses of different groups have different terms; compare each with itself."
    )
    return page.section("Training loss by group", notes, legend + page.figure(plots.loss_curves(history)))


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
                    page.lines(merge["exposure_gap"], "×{:.2f}"),
                    page.lines(merge["loss_at_merge"], "{:.4g}"),
                    "not within the stage" if recovered is None else f"{recovered} steps",
                    page.value(merge["max_output_difference"]),
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
    return page.section("Merges", notes, page.table(header, rows))


def _settings(histories: list[History]) -> str:
    configured = [(history, page.flat(history.start["config"])) for history in histories if "config" in history.start]
    if not configured:
        return ""
    configs = [config for _, config in configured]
    keys = [key for key in dict.fromkeys(key for config in configs for key in config) if key not in NAMES_A_RUN]
    shared = [key for key in keys if all(config.get(key) == configs[0].get(key) for config in configs)]
    differing = [key for key in keys if key not in shared]
    body = page.pairs({key: page.value(configs[0].get(key)) for key in shared})
    if differing:
        seeds: dict[tuple[str, ...], list[str]] = {}
        for history, config in configured:
            row = (escape(history.method), *(page.value(config.get(key)) for key in differing))
            seeds.setdefault(row, []).append(page.value(history.seed))
        rows = [[row[0], ", ".join(of_row), *row[1:]] for row, of_row in seeds.items()]
        table = page.table(["method", "seeds", *differing], rows)
        body = f"<h3>Where runs differ</h3>{table}<h3>Shared by all runs</h3>{body}"
    return page.section("Settings", "", body)


def _origin(histories: list[History]) -> str:
    return page.origin(
        {name: [history.start.get(name, {}) for history in histories] for name in ("machine", "versions")}
    )


def _staged(histories: list[History]) -> History | None:
    """The run whose losses are shown: the first one with merges, or else the first one."""
    return next((h for h in histories if len(h.stages) > 1), histories[0] if histories else None)


def _blocks_of(history: History | None) -> list[int]:
    if history is None:
        return []
    return sorted({block for stage in history.stages for group in stage["groups"] for block in group})
