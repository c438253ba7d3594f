"""The page of a diagnosis: the verdict in words, its figures as tables and plots. Made from `diagnose.json` alone."""

from __future__ import annotations

from html import escape
from pathlib import Path

from stablekd_fast.files import write_atomically
from stablekd_fast.report import page, palette
from stablekd_fast.report.diagnosis_plots import course, gap_dots, losses, standalone

PANELS = {
    "entanglement": "entanglement",
    "signal_share": "signal share",
    "cosine": "cosine, step to step",
    "curvature": "curvature",
    "drift": "drift of the input",
}
MEASURES = {
    "entanglement": "entanglement",
    "own_change": "own change",
    "snr": "SNR",
    "cosine": "cosine",
    "curvature": "curvature",
    "drift": "input drift",
}


def write_diagnosis(out: Path, document: dict) -> None:
    """Write the page of a `diagnose.json` as `report.html` to the directory `out`, and its first plot as `gap.svg`.

    Raises TrainingError if a file cannot be written.
    """
    arms = palette.method_colours(["kd+features", "stablekd"])
    settings = page.pairs({key: page.value(value) for key, value in page.flat(document["settings"]).items()})
    sections = [
        _verdict(document),
        _gap(document),
        _by_block(document),
        _cuts(document),
        _course(document),
        _losses(document),
        page.section("Settings", "", settings),
        page.origin({part: [document[part]] for part in ("machine", "versions")}),
    ]
    colours = {"method": arms, "block": palette.block_colours(len(document["summary"]["blocks"]))}
    page.write_page(out / "report.html", f"Diagnosis: {document['pair']}", sections, colours)
    plot = gap_dots(document["summary"], document["arms"])
    write_atomically(out / "gap.svg", standalone(plot, [light for light, _ in arms]).encode())


def interval_text(value: dict | None) -> str:
    """A mean and its 95% interval as text; a dash for None."""
    return "–" if value is None else f"{value['mean']:.3g} [{value['low']:.3g}, {value['high']:.3g}]"


def _verdict(document: dict) -> str:
    verdict = document["verdict"]
    said = [*verdict["why"], verdict["cuts"], verdict["how_long"]]
    return (
        f'<p class="strong">{escape(verdict["headline"])}</p><ul>{"".join(f"<li>{escape(s)}</li>" for s in said)}</ul>'
    )


def _gap(document: dict) -> str:
    notes = (
        "How much of a block's gradient one step of all other blocks changes, as a part of the gradient's length. A "
        "dot per seed, a bar at the mean, a line for the 95% interval (Student's t)."
    )
    return page.section("The entanglement gap", notes, page.figure(gap_dots(document["summary"], document["arms"])))


def _by_block(document: dict) -> str:
    rows = []
    for block in document["summary"]["blocks"]:
        for arm, variable in zip(document["arms"], ("--method-0", "--method-1")):
            cells = [interval_text(block[arm][measure]) for measure in MEASURES]
            gain = interval_text(block["snr_gain"]) if arm == document["arms"][-1] else ""
            rows.append([str(block["block"] + 1), page.chip(variable, arm), *cells, gain])
    notes = (
        "Mean over the steps looked at (curvature: median), with its 95% interval over seeds. SNR: of the gradient "
        "of one batch. It falls as a block nears its optimum, whatever trains it: the last block, where it is copied "
        "from the teacher, is near it from the start."
    )
    return page.section("Blocks", notes, page.table(["block", "trained", *MEASURES.values(), "SNR gain"], rows))


def _cuts(document: dict) -> str:
    rows = [
        [escape(cut["cut"]), interval_text(cut["entanglement"]), interval_text(cut["exposure"])]
        for cut in document["summary"]["cuts"]
    ]
    notes = (
        "Entanglement that a cut takes away by itself: change of a block's gradient by the steps of the blocks "
        "beyond it, mean over blocks. Exposure: what the cut costs, the loss of the block behind it when the student "
        "feeds it over that when the teacher does, at the last look."
    )
    return page.section("Cuts", notes, page.table(["cut", "entanglement", "exposure"], rows, numbers=True))


def _course(document: dict) -> str:
    chips = [(f"--block-{row['block']}", f"block {row['block'] + 1}") for row in document["summary"]["blocks"]]
    notes = "Mean over seeds. Solid: end to end. Dashed: decomposed."
    panels = "".join(
        page.figure(course(document["blocks"], document["arms"], name, label)) for name, label in PANELS.items()
    )
    return page.section("Over the training", notes, page.legend(chips) + panels)


def _losses(document: dict) -> str:
    notes = (
        "The loss that end-to-end training works on, summed over blocks: thin lines for seeds, bold for their mean. "
        "Dashed: the decomposed blocks fed by the teacher, as they train. The distance from there up is what merging "
        "has to close."
    )
    plot = page.figure(losses(document["blocks"], document["arms"]))
    return page.section("Loss of the composed student", notes, _arms(document) + plot)


def _arms(document: dict) -> str:
    return page.legend([(f"--method-{i}", arm) for i, arm in enumerate(document["arms"])])
