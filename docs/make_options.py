"""Fill the tables of docs/options.md from the settings' own docstrings: `python docs/make_options.py`.

A table stands between `<!-- CLASS: FIELD FIELD ... -->` and `<!-- end -->`. The comment says which fields it shows;
every field of a class stands in one table. The text between the tables is written by hand.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import json
import re
import textwrap
import types
import typing
from pathlib import Path

from stablekd_fast.cache import CacheSettings
from stablekd_fast.config import DistillConfig
from stablekd_fast.data.augmentation import AugmentSettings, CropSettings, EvaluationSettings
from stablekd_fast.diagnose.settings import Probing
from stablekd_fast.engine.schedule import Optimizer, Stage
from stablekd_fast.objectives.fast_dfkd import FastDFKD
from stablekd_fast.objectives.kd import LogitKD
from stablekd_fast.objectives.mekd import MEKD
from stablekd_fast.objectives.mse import FeatureMSE
from stablekd_fast.objectives.registry import options
from stablekd_fast.planning.pair import PairPlan

PAGE = Path(__file__).with_name("options.md")
LOSSES = Path(__file__).with_name("objectives.md")
TABLE = re.compile(r"(<!-- (\w+): ([\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)

SETTINGS = {
    DistillConfig: "--",
    Optimizer: "--optimizer.",
    CacheSettings: "--cache.",
    CropSettings: "--crop.",
    AugmentSettings: "--augment.",
    EvaluationSettings: "--evaluation.",
    LogitKD: "--logits-options.",
    FeatureMSE: "--feature-options.",
    FastDFKD: "--synthesis-options.",
    MEKD: "--auxiliary-options.",
    PairPlan: "--",
    Probing: "--",
    Stage: "",
}
"""The classes whose fields are options, each with what a command has before an option's name. A stage has no option:
it is written in a YAML file."""

OF_LOSSES = {
    config: f"--{place}-options."
    for place, name, config in options()
    if dataclasses.fields(config) and config not in SETTINGS
}
"""The same for the page of methods."""

WORDS = {str: "text", int: "whole number", float: "number", bool: "`true`, `false`", dict: "mapping"}
SECTIONS = {
    Optimizer: "optimizer",
    Stage: "stages",
    CacheSettings: "cache",
    CropSettings: "crop",
    AugmentSettings: "augment",
    EvaluationSettings: "evaluation",
}
"""Settings that consist of settings, and the headings of the page under which theirs stand."""


def filled(page: str, shows: dict[type, str] = SETTINGS) -> str:
    """The page with its tables as they ought to be; it shows each field of these classes.

    Raises ValueError if a field has no docstring, or does not stand in exactly one table.
    """
    classes = {settings.__name__: settings for settings in shows}
    shown = [(name, field) for _, name, fields, _ in TABLE.findall(page) for field in fields.split()]
    wanted = [(name, field.name) for name, settings in classes.items() for field in dataclasses.fields(settings)]
    wrong = sorted({pair for pair in (*shown, *wanted) if shown.count(pair) != 1 or pair not in wanted})
    if wrong:
        raise ValueError(f"These fields do not stand in exactly one table of the page: {wrong}.")
    return TABLE.sub(lambda found: found[1] + table(classes[found[2]], found[3].split()) + found[4], page)


def table(settings: type, fields: list[str]) -> str:
    """Rows of markdown: each field as an option, with its type, its default and its docstring."""
    meanings, kinds = docstrings(settings), typing.get_type_hints(settings)
    by_name = {field.name: field for field in dataclasses.fields(settings)}
    rows = ["| option | type | default | meaning |", "|---|---|---|---|"]
    for name in fields:
        if name not in meanings:
            raise ValueError(f"{settings.__name__}.{name} has no docstring.")
        meaning = re.sub(r"\bNone\b", "`null`", meanings[name])
        cells = (f"`{spelled(settings, name)}`", kind(kinds[name]), default(by_name[name]), meaning)
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def docstrings(settings: type) -> dict[str, str]:
    """The string behind each field of a dataclass and of those that it is made from, on one line."""
    kinds = [kind for kind in reversed(settings.__mro__) if dataclasses.is_dataclass(kind)]
    bodies = [ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0].body for kind in kinds]
    return {
        field.target.id: " ".join(text.value.value.split())
        for body in bodies
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }


def spelled(settings: type, name: str) -> str:
    """A field as a command takes it; without a command, as a YAML file does."""
    prefix = {**SETTINGS, **OF_LOSSES}[settings]
    return prefix + name.replace("_", "-") if prefix else name


def kind(annotation: object) -> str:
    """A type in words; that `null` may be given is seen from the default."""
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return " or ".join(kind(argument) for argument in arguments if argument is not types.NoneType)
    if typing.get_origin(annotation) is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if annotation in SECTIONS:
        return f"[settings](#{SECTIONS[annotation]})"
    if typing.get_origin(annotation) is list:
        return "[list](#stages)" if arguments == (Stage,) else "list"
    return WORDS[typing.get_origin(annotation) or annotation]


def default(field: dataclasses.Field) -> str:
    """A field's default as a command takes it."""
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        value = field.default
    if value is dataclasses.MISSING:
        return "required"
    if dataclasses.is_dataclass(value):
        return "its defaults"
    if isinstance(value, list):
        return f"`[{', '.join(value)}]`"
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value)}`"


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
    LOSSES.write_text(filled(LOSSES.read_text(), OF_LOSSES))
