"""`stablekd diagnose`"""

from __future__ import annotations

import dataclasses

from jsonargparse import Namespace

from stablekd_fast.cli.options import fields_of
from stablekd_fast.cli.spelling import Parser
from stablekd_fast.config import DistillConfig
from stablekd_fast.diagnose.settings import ARMS, END_TO_END, NOT_USED, Probing
from stablekd_fast.report.terminal import console, print_rows


def add_arguments(parser: Parser) -> None:
    """Add the settings of a diagnosis."""
    parser.add_argument("--config", action="config", help="YAML file with any of these settings")
    parser.add_class_arguments(DistillConfig, skip={*NOT_USED})
    parser.add_class_arguments(Probing)
    parser.add_argument("--out", type=str, default="runs/diagnose", help="directory for diagnose.json and report.html")


def run(options: Namespace) -> int:
    """Diagnose a pair and show what was found."""
    from stablekd_fast.diagnose.diagnosis import diagnose

    values = fields_of(options)
    out = values.pop("out")
    probing = Probing(**{field.name: values.pop(field.name) for field in dataclasses.fields(Probing)})
    found = diagnose(DistillConfig(**values), probing, out=out)
    title = "blocks: mean over steps [95% interval over seeds], or end to end / decomposed"
    print_rows(title, [_row(block) for block in found.summary.blocks])
    print_rows("cuts", [{name: _text(value) for name, value in row.items()} for row in found.summary.cuts])
    console.print(f"[bold]{found.verdict.headline}[/bold]")
    for sentence in (*found.verdict.why, found.verdict.cuts, found.verdict.how_long):
        console.print(sentence, highlight=False, markup=False)
    console.print(f"Rows and plots: {out}", highlight=False)
    return 0


def _row(block: dict) -> dict:
    """Return a block in the widths of a terminal: intervals of what decides, means of the rest.

    Two values in a cell are end to end / decomposed.
    """

    def both(name: str) -> str:
        return " / ".join("–" if block[arm][name] is None else f"{block[arm][name].mean:.2g}" for arm in ARMS)

    return {
        "block": block["block"] + 1,
        "entanglement": _text(block[END_TO_END]["entanglement"]),
        "SNR gain": _text(block["snr_gain"]),
        **{name: both(name) for name in ("snr", "cosine", "curvature", "drift")},
    }


def _text(value: object) -> str:
    return "–" if value is None else str(value)
