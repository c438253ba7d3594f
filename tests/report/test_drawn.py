"""What plots show: positions of lines, dots, bars and texts, by the values that they stand for."""

import math

import pytest
from matplotlib.colors import to_hex

from stablekd_fast.report import diagnosis_plots, plots
from stablekd_fast.report.history import History
from stablekd_fast.report.plots import series
from tests.report.test_cells import events


@pytest.fixture
def drawn(monkeypatch):
    """The axes of the last plot; plots give their names and families of colours."""
    kept = []

    def as_svg(figure, name, family):
        figure.draw_without_rendering()
        kept.append(figure.axes[0])
        return f"{name} {family}"

    for module in (plots, diagnosis_plots):
        monkeypatch.setattr(module, "as_svg", as_svg)
    return lambda: kept[-1]


def lines(axes):
    """(colour, x, y, width) of each line."""
    found = []
    for line in axes.get_lines():
        x, y = ([round(float(value), 6) for value in values] for values in line.get_data())
        found.append((to_hex(line.get_color()), x, y, line.get_linewidth()))
    return found


def ticks(axes):
    return [label.get_text() for label in axes.get_yticklabels()]


def test_dots_of_accuracies(drawn):
    assert plots.dots({"kd": [0.5, 0.7], "ours": [0.8]}) == "dots method"
    axes = drawn()
    spread = math.sqrt(0.02)
    assert lines(axes) == [
        (series(0), [round(0.6 - spread, 6), round(0.6 + spread, 6)], [0, 0], 2.2),
        (series(0), [0.6, 0.6], [-0.27, 0.27], 2.8),
        (series(0), [0.5, 0.7], [0, 0], pytest.approx(1.5)),
        (series(1), [0.8, 0.8], [0.73, 1.27], 2.8),
        (series(1), [0.8], [1], pytest.approx(1.5)),
    ]
    assert ticks(axes) == ["kd", "ours"] and axes.get_xlabel() == "accuracy on the test split"
    assert axes.yaxis_inverted(), "the first method is on top"
    assert_rows_are_plain(axes)


def assert_rows_are_plain(axes):
    """Rows have names, and neither lines nor a border."""
    assert not any(line.get_visible() for line in axes.yaxis.get_gridlines())
    assert not axes.spines["left"].get_visible()


def test_curves_of_accuracies(drawn):
    histories = [History.from_events(f"{m}{s}", events(m, s)) for m, s in (("kd", 0), ("ours", 1), ("ours", 2))]
    assert plots.curves(histories, ["ours", "kd"], "validation") == "accuracy method"
    axes = drawn()
    curve = [1.5, 3.75, 5.0], [0.1, 0.2, 0.3]
    expected = []
    for index, runs in ((0, 2), (1, 1)):
        expected += [(series(index), [epoch, epoch], [0, 1], 1.1) for epoch in (1.5, 3.75)]
        expected += [(series(index), *curve, 0.9)] * runs + [(series(index), *curve, 2.6)]
    assert lines(axes) == expected
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_xlim()[0]) == ("epoch", "validation accuracy", 0)
    assert axes.yaxis.get_major_formatter()(0.25) == "25%"


def test_curves_of_losses(drawn):
    history = History.from_events("a", events("ours", 0))
    assert plots.loss_curves(history) == "loss block"
    axes = drawn()
    assert lines(axes) == [
        (series(0), [1.5], [1.0], 1.8),
        (series(1), [3.75], [2.0], 1.8),
        (series(2), [5.0], [3.0], 1.8),
        ("#000000", [1.5, 1.5], [0, 1], 1.0),
        ("#000000", [3.75, 3.75], [0, 1], 1.0),
    ]
    assert [(text.get_text(), text.xy, text.get_ha()) for text in axes.texts] == [
        ("1|2|3", (0.75, 1.0), "center"),
        ("1+2|3", (2.625, 1.0), "center"),
        ("1+2+3", (4.375, 1.0), "center"),
    ]
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_xlim()[0]) == ("epoch", "training loss", 0)
    assert axes.get_yscale() == "log"
    history.stages[0]["name"], history.stages[1]["name"] = "x" * 40, "x" * 41
    history.train[0]["losses"] = {"1": -1.0}
    plots.loss_curves(history)
    assert [text.get_text() for text in drawn().texts] == ["x" * 40, "1+2+3"], "longer names run into each other"
    assert drawn().get_yscale() == "linear", "a loss below zero has no logarithm"


def test_bars_of_times(drawn):
    fast = {"median_seconds": 0.002, "spread_seconds": 0.0005, "limit_seconds": 0.001}
    slow = {"median_seconds": 0.004, "spread_seconds": 0.005}
    rows = [{"label": "a", "note": "fast", "colour": 0, **fast}, {"label": "b", "note": "slow", "colour": 2, **slow}]
    assert plots.timing_bars(rows, "bench") == "bench bench"
    axes = drawn()
    bars = [(to_hex(bar.get_facecolor()), bar.get_width(), bar.get_y() + bar.get_height() / 2) for bar in axes.patches]
    assert bars == [
        (series(0), pytest.approx(2.0), pytest.approx(0)),
        (series(2), pytest.approx(4.0), pytest.approx(1)),
    ]
    assert [line[:3] for line in lines(axes)] == [
        ("#000000", [1.5, 2.5], [0, 0]),
        (series(3), [1.0, 1.0], [-0.44, 0.44]),
        ("#000000", [0, 9.0], [1, 1]),
    ]
    assert [(text.get_text(), text.xy) for text in axes.texts] == [("fast", (2.5, 0)), ("slow", (9.0, 1))]
    assert ticks(axes) == ["a", "b"] and axes.get_xlim() == (0, pytest.approx(1.16 * 9))


def diagnosis():
    """Two arms, two blocks, two seeds, three steps; every number tells where it belongs."""
    rows = []
    for arm in (0, 1):
        for block in (0, 1):
            for seed in (0, 1):
                for step in (0, 10, 20):
                    own = 1 + arm + 10 * block + 100 * seed + step
                    rows.append({"arm": ("together", "apart")[arm], "block": block, "seed": seed, "step": step,
                                 "curvature": own, "loss": 2 * own, "composed_loss": 3 * own})  # fmt: skip
    return rows


def test_courses_of_a_measure(drawn):
    assert diagnosis_plots.course(diagnosis(), ["together", "apart"], "curvature", "how bent") == "curvature block"
    axes = drawn()
    steps = [0, 10, 20]
    assert lines(axes) == [
        (series(block), steps, [51 + arm + 10 * block + step for step in steps], 1.8)
        for arm in (0, 1)
        for block in (0, 1)
    ]
    assert [line.is_dashed() for line in axes.get_lines()] == [False, False, True, True]
    assert axes.get_yscale() == "symlog" and axes.get_ylabel() == "how bent" and axes.get_xlim()[0] == 0
    diagnosis_plots.course(diagnosis(), ["together", "apart"], "loss", "loss")
    assert drawn().get_yscale() == "linear"


def test_losses_of_a_diagnosis(drawn):
    assert diagnosis_plots.losses(diagnosis(), ["together", "apart"]) == "losses method"
    axes = drawn()
    steps, expected = [0, 10, 20], []
    for arm in (0, 1):
        for seed in (0, 1):
            expected.append((series(arm), steps, [3 * (2 * (1 + arm + 100 * seed + s) + 10) for s in steps], 0.9))
        expected.append((series(arm), steps, [3 * (2 * (51 + arm + s) + 10) for s in steps], 2.6))
    expected.append((series(1), steps, [2 * (2 * (52 + s) + 10) for s in steps], 1.8))
    assert lines(axes) == expected
    assert axes.get_yscale() == "log" and axes.get_xlim()[0] == 0
    assert [line.get_alpha() for line in axes.get_lines()] == [0.5, 0.5, None, 0.5, 0.5, None, None], "runs are faint"


def test_losses_are_those_of_blocks_that_have_one_end_to_end(drawn):
    """Where blocks train together, some may have no loss of their own."""
    rows = diagnosis()
    for row in rows:
        if row["arm"] == "together" and row["block"] == 1:
            row["composed_loss"] = None
    diagnosis_plots.losses(rows, ["together", "apart"])
    first = lines(drawn())[0]
    assert first[2] == [3 * (1 + step) for step in (0, 10, 20)], "of block 1 alone"


def test_gaps_of_a_diagnosis(drawn):
    def interval(mean):
        return {"mean": mean, "low": mean - 0.25, "high": mean + 0.5, "values": [mean - 0.125, mean + 0.125]}

    summary = {
        "blocks": [{"block": 0, "a": {"entanglement": interval(1.0)}, "b": {"entanglement": interval(2.0)}}],
        "gap": interval(3.0),
    }
    assert diagnosis_plots.gap_dots(summary, ["a", "b"]) == "gap method"
    expected = []
    for colour, mean, place in ((series(0), 1.0, -0.15), (series(1), 2.0, 0.15), ("#000000", 3.0, 1.0)):
        expected += [
            (colour, [mean - 0.25, mean + 0.5], [place, place]),
            (colour, [mean, mean], [round(place - 0.13, 6), round(place + 0.13, 6)]),
            (colour, [mean - 0.125, mean + 0.125], [place, place]),
        ]
    assert [line[:3] for line in lines(drawn())] == expected
    assert ticks(drawn()) == ["block 1", "gap, all blocks"]
    assert_rows_are_plain(drawn())
    assert [text.get_text() for text in drawn().get_legend().get_texts()] == ["a", "b"]
