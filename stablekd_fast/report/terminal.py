"""Rows as tables on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

console = Console()


def print_rows(title: str, rows: list[dict]) -> None:
    """Print rows that have the same keys as a table with a title."""
    table = Table(title=title, title_justify="left")
    for key in rows[0]:
        table.add_column(key.replace("_", " "), overflow="fold")
    for row in rows:
        table.add_row(*("" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    console.print(table)
