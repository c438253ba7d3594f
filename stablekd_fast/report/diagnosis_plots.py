"""Plots of a diagnosis, from the rows and figures of `diagnose.json`."""

from __future__ import annotations

import math
import statistics

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from stablekd_fast.report.plots import as_svg, draw_line, in_our_style, logarithmic, new_figure, series


def gap_dots(summary: dict, arms: list[str]) -> str:
    """Draw entanglement by block and arm, and the gap over all blocks.

    Dots are seeds, bars means, lines intervals.
    """
    names = [f"block {row['block'] + 1}" for row in summary["blocks"]] + ["gap, all blocks"]
    with in_our_style():
        figure, axes = new_figure(1.1 + 0.42 * len(names))
        for place, row in enumerate(summary["blocks"]):
            for arm, name in enumerate(arms):
                _interval(axes, row[name]["entanglement"], place + 0.3 * arm - 0.15, series(arm))
        _interval(axes, summary["gap"], len(names) - 1, "black")
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        handles = [Line2D([], [], color=series(arm), linewidth=2.8, label=name) for arm, name in enumerate(arms)]
        axes.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
        axes.set_xlabel("change of the gradient by the other blocks' step / its length")
        return as_svg(figure, "gap", "method")


def course(rows: list[dict], arms: list[str], measure: str, label: str) -> str:
    """Draw a measure over steps by block, mean over seeds: solid end to end, dashed decomposed."""
    with in_our_style():
        figure, axes = new_figure(2.9)
        for arm, style in zip(arms, ("-", (0, (4, 3)))):
            for block in sorted({row["block"] for row in rows}):
                own = [row for row in rows if row["arm"] == arm and row["block"] == block]
                draw_line(axes, _means(own, measure), color=series(block), linewidth=1.8, linestyle=style)
        if measure == "curvature":  # blocks differ by orders of magnitude, and it may be negative
            axes.set_yscale("symlog", linthresh=0.01)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlim(left=0)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        return as_svg(figure, measure, "block")


def losses(rows: list[dict], arms: list[str]) -> str:
    """Draw the composed student's whole loss over steps by arm, and that of the decomposed blocks as they train."""
    shared = {row["block"] for row in rows if row["arm"] == arms[0] and row["composed_loss"] is not None}
    rows = [row for row in rows if row["block"] in shared]
    with in_our_style():
        figure, axes = new_figure(3.6)
        own: list[dict] = []
        for index, arm in enumerate(arms):
            own = [row for row in rows if row["arm"] == arm]
            for seed in sorted({row["seed"] for row in own}):
                of_seed = [row for row in own if row["seed"] == seed]
                draw_line(axes, _sums(of_seed, "composed_loss"), color=series(index), linewidth=0.9, alpha=0.5)
            draw_line(axes, _sums(own, "composed_loss"), color=series(index), linewidth=2.6)
        draw_line(axes, _sums(own, "loss"), color=series(1), linewidth=1.8, linestyle=(0, (4, 3)))
        logarithmic(axes)
        axes.set_xlim(left=0)
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        return as_svg(figure, "losses", "method")


def standalone(svg: str, colours: list[str]) -> str:
    """Turn a plot of a page into a file of its own, on a light ground; `colours` are those of its series."""
    for index, colour in enumerate(colours):
        svg = svg.replace(f"var(--method-{index})", colour)
    svg = svg.replace("var(--grid)", "#e6e8eb").replace("currentColor", "#1d2125")
    attributes = 'xmlns="http://www.w3.org/2000/svg" style="background: #fcfcfb; font-family: sans-serif"'
    return svg.replace("<svg ", f"<svg {attributes} ", 1)


def _interval(axes: Axes, value: dict | None, place: float, colour: str) -> None:
    if value is None:
        return
    axes.plot([value["low"], value["high"]], [place, place], color=colour, linewidth=2.2, alpha=0.55)
    axes.plot([value["mean"]] * 2, [place - 0.13, place + 0.13], color=colour, linewidth=2.8)
    axes.plot(
        value["values"], [place] * len(value["values"]), "o", color=colour, markersize=5, alpha=0.7, markeredgewidth=0
    )


def _means(rows: list[dict], measure: str) -> list[tuple[int, float]]:
    """(step, mean over the rows of that step); NaN where one was not measured."""
    points = []
    for step in sorted({row["step"] for row in rows}):
        values = [math.nan if row[measure] is None else row[measure] for row in rows if row["step"] == step]
        points.append((step, statistics.fmean(values)))
    return points


def _sums(rows: list[dict], measure: str) -> list[tuple[int, float]]:
    """(step, sum over blocks of the mean over seeds)."""
    blocks = sorted({row["block"] for row in rows})
    curves = [_means([row for row in rows if row["block"] == block], measure) for block in blocks]
    return [(at[0][0], sum(value for _, value in at)) for at in zip(*curves)]
