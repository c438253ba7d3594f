"""The page on the campaign's outcomes."""

from __future__ import annotations

from pathlib import Path

import tomllib
from operators import Mutant
from sandbox import ROOT

HERE = Path(__file__).parent
PAGE = ROOT / "docs" / "results" / "mutation.md"
BEGIN, END = "<!-- outcomes -->", "<!-- end of outcomes -->"

Outcomes = dict[tuple, dict]


def write_report(rooms: dict[str, tuple[list[Mutant], list[dict], Outcomes]]) -> None:
    """Replace the tables of the page: `rooms` gives for each its bugs, those whose place is gone, and outcomes."""
    reasons = {
        (one["path"], one.get("function", ""), one["before"], one["after"], one.get("nth", 0)): one["reason"]
        for one in tomllib.loads((HERE / "equivalent.toml").read_text()).get("bug", [])
    }
    lines, survivors = ["| room | bugs | change nothing | noticed | of the others |", "|---|---|---|---|---|"], []
    for room, (found, gone, known) in rooms.items():
        for kind in ("drawn", "by hand"):
            own = [one for one in found if one.operator.startswith("by hand") == (kind == "by hand")]
            tried = [one for one in own if one.name in known]
            survived = [one for one in tried if not known[one.name]["noticed"]]
            same = [one for one in survived if _key(one) in reasons]
            noticed, counted = len(tried) - len(survived), len(tried) - len(same)
            lost = sum(one["operator"].startswith("by hand") == (kind == "by hand") for one in gone)
            more = "".join(
                [f", {len(own) - len(tried)} not tried"] * (len(own) > len(tried)) + [f", {lost} gone"] * bool(lost)
            )
            if own or lost:
                share = f"{100 * noticed / counted:.0f}%" if counted else "–"
                lines.append(f"| {room}, {kind} | {len(tried)}{more} | {len(same)} | {noticed} | {share} |")
            survivors += [(one, reasons.get(_key(one), "**not noticed**")) for one in survived]
    lines += ["", "Bugs that no test noticed:", "", "| where | bug | why |", "|---|---|---|"]
    lines += [f"| `{one.path}`, {one.function or 'module'} | {_change(one)} | {why} |" for one, why in survivors]
    text = PAGE.read_text()
    head, tail = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    PAGE.write_text(head + "\n" + "\n".join(lines) + "\n" + tail)


def _key(one: Mutant) -> tuple:
    return one.path, one.function, one.before, one.after, one.nth


def _change(one: Mutant) -> str:
    before, after = (" ".join(text.split()).replace("|", "\\|") for text in (one.before, one.after))
    shown = f"`{before[:90]}` → `{after[:90]}`" if after not in ("", "pass") else f"`{before[:90]}` dropped"
    return f"{one.operator}: {shown}"
