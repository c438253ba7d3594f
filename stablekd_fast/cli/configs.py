"""Config files may come from anybody: each is looked at before a parser takes it apart."""

from __future__ import annotations

import os
from typing import Any

import yaml

from stablekd_fast.files.reading import open_regular

LARGEST = 1 << 20
"""The bytes of the largest config file that is read."""
MOST_VALUES = 100_000
"""The values that a config may hold, each alias counted with all it stands for."""


def fault_of(path: str | os.PathLike[str]) -> str | None:
    """Say why the file is no config that a parser may read: its size, its encoding, or aliases that multiply.

    What is no YAML passes: the parser names the line.
    """
    try:
        with open_regular(path) as file:
            content = file.read(LARGEST + 1)
    except FileNotFoundError:
        return None  # the parser says it
    except (OSError, ValueError) as error:
        return f"{getattr(error, 'strerror', None) or error}; save it as a file"
    if len(content) > LARGEST:
        return f"it is larger than {LARGEST:,} bytes, which no config needs"
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return f"its byte {error.start} is not UTF-8; save it as UTF-8 text"
    if "\0" in text:
        return "it holds a NUL character; save it as UTF-8 text"
    try:
        values = _values(yaml.compose(text, yaml.SafeLoader), {})
    except (yaml.YAMLError, RecursionError, ValueError):
        return None  # the parser says it
    if values > MOST_VALUES:
        return f"its aliases (*name) stand for more than {MOST_VALUES:,} values; write out what they mean"
    return None


def _values(node: yaml.Node | None, known: dict[int, float]) -> float:
    """Count the values below a node; what holds itself holds infinitely many."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        known[id(node)] = float("inf")
        pairs = isinstance(node, yaml.MappingNode)
        inner = [part for pair in node.value for part in pair] if pairs else node.value
        known[id(node)] = 1 + sum(_values(part, known) for part in inner)
    return known[id(node)]


def option_with_nul(values: Any, name: str = "") -> str | None:
    """Name the first setting whose text holds a NUL character, which no path and no name can; None if there is none."""
    if isinstance(values, str):
        return name if "\0" in values else None
    if isinstance(values, dict) or hasattr(values, "__dict__"):
        pairs = (values if isinstance(values, dict) else vars(values)).items()
        found = (option_with_nul(value, f"{name}.{key}".lstrip(".")) for key, value in pairs)
    elif isinstance(values, list | tuple):
        found = (option_with_nul(value, name) for value in values)
    else:
        return None
    return next(filter(None, found), None)
