"""The report's plots as SVG elements whose colours are CSS variables, so that one plot serves light and dark pages.

A series is drawn in a stand-in colour (`series(3)` is #000004) that becomes `var(--method-3)` or `var(--block-3)`.
Everything drawn in black becomes `currentColor`.
"""

from __future__ import annotations

import io
import math
import re
import statistics
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from stablekd_fast.report.history import History

WIDTH = 9.0
"""Inches; the page scales the plot to its column."""
GRID = "#0000ff"
OURS, RIVAL, BASELINE, LIMIT_COLOUR = range(4)
"""The series of a bench's plot."""
STYLE = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "text.parse_math": False,  # a method's name is no formula
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.solid_capstyle": "round",
}


def series(index: int) -> str:
    """The stand-in colour of a series; there are 200 of them."""
    return f"#0000{index % 200 + 1:02x}"


def dots(reached: dict[str, list[float]], measure: str = "accuracy") -> str:
    """Draw what was reached on the test split by method: a dot per run, a bar at the mean, a line of one standard
    deviation."""
    with in_our_style():
        figure, axes = new_figure(0.75 + 0.36 * len(reached))
        for row, values in enumerate(reached.values()):
            colour, mean = series(row), statistics.fmean(values)
            if len(values) > 1:
                spread = statistics.stdev(values)
                axes.plot([mean - spread, mean + spread], [row, row], color=colour, linewidth=2.2, alpha=0.55)
            axes.plot([mean, mean], [row - 0.27, row + 0.27], color=colour, linewidth=2.8)
            axes.plot(values, [row] * len(values), "o", color=colour, markersize=6, alpha=0.7, markeredgewidth=0)
        axes.set_yticks(range(len(reached)), list(reached))
        axes.set_ylim(len(reached) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.margins(x=0.08)
        if measure == "accuracy":
            axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel(f"{measure} on the test split")
        return as_svg(figure, "dots", "method")


def curves(histories: list[History], methods: list[str], split: str, measure: str = "accuracy") -> str:
    """Draw a measure over epochs: a thin line per run, a bold one for each method's mean, dashed ones at its merges."""
    with in_our_style():
        figure, axes = new_figure(4.2)
        for index, method in enumerate(methods):
            colour = series(index)
            own = [history for history in histories if history.method == method]
            for epoch in sorted({epoch for history in own for epoch in history.merge_epochs()}):
                axes.axvline(epoch, color=colour, linewidth=1.1, linestyle=(0, (5, 4)), alpha=0.75)
            lines = [history.reached(split) for history in own if history.reached(split)]
            for curve in lines:
                draw_line(axes, curve, color=colour, linewidth=0.9, alpha=0.5)
            mean = mean_curve(lines)
            draw_line(axes, mean, color=colour, linewidth=2.6, marker="o" if len(mean) < 2 else None)
        _name_values(axes, split, measure)
        axes.set_xlabel("epoch")
        return as_svg(figure, "accuracy", "method")


def _name_values(axes: Axes, split: str, measure: str) -> None:
    """Have the upward axis show the values of a measure."""
    if measure == "accuracy":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlim(left=0)
    axes.set_ylabel(f"{split} {measure}")


def measure_over_seconds(histories: list[History], methods: list[str], split: str, measure: str = "accuracy") -> str:
    """Draw a measure over seconds of training: a thin line per run, a bold one for the mean of each method."""
    with in_our_style():
        figure, axes = new_figure(4.2)
        for index, method in enumerate(methods):
            lines = [history.reached_over_seconds(split) for history in histories if history.method == method]
            for curve in lines:
                draw_line(axes, curve, color=series(index), linewidth=0.9, alpha=0.5)
            draw_line(axes, mean_of_points(lines), color=series(index), linewidth=2.6)
        _name_values(axes, split, measure)
        axes.set_xlabel("seconds of training, evaluations left out")
        return as_svg(figure, "seconds", "method")


def mean_of_points(curves: list[list[tuple[float, float | None]]]) -> list[tuple[float, float]]:
    """The mean over runs of each one's first point, second point and so on, as far as all runs go."""
    points = [point for point in zip(*curves) if all(value is not None for _, value in point)]
    return [(statistics.fmean(x for x, _ in point), statistics.fmean(y for _, y in point)) for point in points]


def mean_curve(curves: list[list[tuple[float, float | None]]]) -> list[tuple[float, float]]:
    """The mean over runs at the epochs that all runs have, so that no run joins or leaves the mean on the way."""
    by_epoch = [{round(epoch, 6): value for epoch, value in curve if value is not None} for curve in curves]
    shared = set.intersection(*map(set, by_epoch)) if by_epoch else set()
    return [(epoch, statistics.fmean(values[epoch] for values in by_epoch)) for epoch in sorted(shared)]


def loss_curves(history: History) -> str:
    """Draw each group's loss over epochs, in the colour of its last block; dashed lines and names mark stages."""
    curves = history.losses()
    with in_our_style():
        figure, axes = new_figure(4.4)
        for (_, group), curve in curves.items():
            draw_line(axes, curve, color=series(last_block(group)), linewidth=1.8)
        if all(loss > 0 for curve in curves.values() for _, loss in curve if loss is not None):
            logarithmic(axes)
        axes.set_xlim(left=0)
        _mark_stages(axes, history)
        axes.set_xlabel("epoch")
        axes.set_ylabel("training loss")
        return as_svg(figure, "loss", "block")


def timing_bars(rows: list[dict], name: str) -> str:
    """Draw the median milliseconds of a bench's contenders: a bar each with its spread, and a mark at its limit.

    Rows have `label`, `note` (shown beside the bar), `colour` (the index of a series), `median_seconds`,
    `spread_seconds` and perhaps `limit_seconds`. `name` tells the plots of a page apart.
    """
    with in_our_style():
        figure, axes = new_figure(0.75 + 0.3 * len(rows))
        for place, row in enumerate(rows):
            median, spread = 1e3 * row["median_seconds"], 1e3 * row["spread_seconds"]
            axes.barh(place, median, height=0.62, color=series(row["colour"]), alpha=0.85)
            axes.plot([max(median - spread, 0), median + spread], [place, place], color="black", linewidth=1.4)
            if row.get("limit_seconds") is not None:
                limit = 1e3 * row["limit_seconds"]
                axes.plot([limit, limit], [place - 0.44, place + 0.44], color=series(LIMIT_COLOUR), linewidth=2.6)
            axes.annotate(row["note"], (median + spread, place), xytext=(6, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(rows)), [row["label"] for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(0, 1.16e3 * max(row["median_seconds"] + row["spread_seconds"] for row in rows))
        axes.set_xlabel("milliseconds, median over rounds; less is better")
        return as_svg(figure, name, "bench")


def last_block(group: str) -> int:
    """The index from 0 of the last block of a group called like `1+2`; 0 for a group called otherwise."""
    digits = re.findall(r"\d+", group)
    return int(digits[-1]) - 1 if digits else 0


def _mark_stages(axes: Axes, history: History) -> None:
    for epoch in history.merge_epochs():
        axes.axvline(epoch, color="black", linewidth=1.0, linestyle=(0, (5, 4)), alpha=0.6)
    for stage in history.stages:
        if len(stage["name"]) <= 40:  # longer names would run into each other
            middle = (stage["first_step"] + stage["last_step"]) / 2 / history.steps_per_epoch
            if middle <= axes.get_xlim()[1]:
                axes.annotate(
                    stage["name"], (middle, 1.0), xycoords=("data", "axes fraction"), xytext=(0, 5),
                    textcoords="offset points", ha="center", va="bottom",
                )  # fmt: skip


def logarithmic(axes: Axes) -> None:
    """Make the vertical axis logarithmic, with plain numbers at its ticks."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 500 else (1.0,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def draw_line(axes: Axes, points: Sequence[tuple[float, float | None]], **style) -> None:
    """Draw a line through (x, y); it is broken where y is None."""
    values = [math.nan if value is None else value for _, value in points]
    axes.plot([x for x, _ in points], values, **style)


def in_our_style() -> AbstractContextManager[None]:
    """A context with matplotlib's defaults and our style on top, whatever the process uses elsewhere."""
    settings: dict[Any, Any] = {**_defaults(), **STYLE}
    return matplotlib.rc_context(settings)


def _defaults() -> dict:
    # A backend in the settings would be switched to; deprecated keys would warn.
    return {key: value for key, value in matplotlib.rcParamsDefault.items() if "backend" not in key}


def new_figure(height: float) -> tuple[Figure, Axes]:
    """A figure of the page's width and a height in inches, with one pair of axes."""
    figure = Figure((WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def as_svg(figure: Figure, name: str, family: str) -> str:
    """An `<svg>` element for a page. Ids begin with `name`, since a page has several plots; colours are
    `var(--family-i)`."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = text.replace("xlink:href", "href")
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    text = text.replace(GRID, "var(--grid)").replace("#000000", "currentColor")
    return re.sub(r"#0000([0-9a-f]{2})\b", lambda match: f"var(--{family}-{int(match.group(1), 16) - 1})", text)
