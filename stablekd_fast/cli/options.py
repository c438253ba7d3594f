"""Options of commands as plain values."""

from __future__ import annotations

from typing import Any

from jsonargparse import Namespace


def listed(names: str | None) -> list[str]:
    """Split names with commas between."""
    return [name.strip() for name in names.split(",")] if names else []


def fields_of(options: Namespace) -> dict[str, Any]:
    """Return the values of settings that may have come from a `--config` file, without the name of that file."""
    values = dict(vars(options))
    values.pop("config", None)
    return values
