"""Options of commands as plain values."""

from __future__ import annotations


def listed(names: str | None) -> list[str]:
    return [name.strip() for name in names.split(",")] if names else []


def fields_of(options) -> dict:
    values = dict(vars(options))
    values.pop("config", None)
    return values
