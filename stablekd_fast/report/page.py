"""A page: one HTML file that needs no other file, in light and in dark; and the pieces of which pages are made."""

from __future__ import annotations

import json
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from stablekd_fast.files import write_atomically
from stablekd_fast.report.style import STYLE_SHEET

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


def write_page(path: Path, title: str, sections: Iterable[str], colours: dict[str, list[tuple[str, str]]]) -> None:
    """Write a page of the sections that are not empty, whole or not at all.

    `colours` are pairs (on light, on dark) by family; plots refer to the i-th of a family as `var(--family-i)`. Raises
    TrainingError if the file cannot be written.
    """
    text = PAGE.format(
        title=escape(title),
        style=STYLE_SHEET.strip(),
        colours=_colour_variables(colours),
        body="\n".join(html for html in sections if html),
    )
    write_atomically(Path(path), text.encode())


def _colour_variables(colours: dict[str, list[tuple[str, str]]]) -> str:
    def rules(side: int) -> str:
        return " ".join(
            f"--{name}-{i}: {pair[side]};" for name, pairs in colours.items() for i, pair in enumerate(pairs)
        )

    return f":root {{ {rules(0)} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {rules(1)} }} }}"


def origin(parts: dict[str, list[dict]]) -> str:
    """A section on where something ran: for each part, such as `machine`, the values that its sources gave."""
    html = ""
    for name, sources in parts.items():
        found: dict[str, list[str]] = {}
        for source in sources:
            for key, item in source.items():
                text = f"{item / 2**30:.1f} GiB" if key == "memory_bytes" and item else value(item)
                if text not in found.setdefault(key, []):
                    found[key].append(text)
        if found:
            html += f"<h3>{name.capitalize()}</h3>"
            html += pairs({key.removesuffix("_bytes"): " / ".join(texts) for key, texts in found.items()})
    return section("Where it ran", "", html) if html else ""


# Pieces of HTML. Arguments called `html` or holding cells are escaped already.


def section(title: str, notes: str, html: str) -> str:
    """A section with its heading, a note in smaller print unless `notes` is empty, and a body."""
    note = f'<p class="note">{notes}</p>' if notes else ""
    return f"<section>\n<h2>{escape(title)}</h2>\n{note}\n{html}\n</section>"


def table(header: list[str], rows: list[list[str]], *, numbers: bool = False, emphasised: str | None = None) -> str:
    """A table; `numbers` aligns all columns but the first to the right, `emphasised` names a column in bold."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    strong = [' class="strong"' if name == emphasised else "" for name in header]
    body = "".join(f"<tr>{''.join(f'<td{s}>{cell}</td>' for s, cell in zip(strong, row))}</tr>\n" for row in rows)
    kind = ' class="numbers"' if numbers else ""
    return f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'


def pairs(values: dict[str, str]) -> str:
    """A list of names with their values."""
    items = "".join(f"<div><dt>{escape(key)}</dt><dd>{html}</dd></div>\n" for key, html in values.items())
    return f"<dl>\n{items}</dl>"


def figure(svg: str) -> str:
    """A plot that scrolls where the page is narrow."""
    return f'<div class="scroll"><figure>{svg}</figure></div>'


def legend(entries: list[tuple[str, str]]) -> str:
    """A line of chips, one for each (colour variable, text)."""
    return f'<p class="legend">{"".join(chip(variable, text) for variable, text in entries)}</p>'


def chip(variable: str, text: str) -> str:
    """A text behind a square in the colour of a CSS variable."""
    return f'<span class="chip"><i style="background: var({variable})"></i>{escape(text)}</span>'


def lines(values: dict[str, float | None], form: str) -> str:
    """A line of text for each name and its number, written as the format string `form` says."""
    texts = (f"{name}: {'not finite' if value is None else form.format(value)}" for name, value in values.items())
    return "<br>".join(map(escape, texts))


def value(value: Any) -> str:
    """A setting or a measure as escaped text."""
    if value is None or value == [] or value == {}:
        return "–"
    if isinstance(value, float):
        return f"{value:.6g}"
    return escape(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def flat(values: dict, prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names."""
    found: dict[str, Any] = {}
    for key, item in values.items():
        if isinstance(item, dict) and item:
            found |= flat(item, f"{prefix}{key}.")
        else:
            found[prefix + key] = item
    return found
