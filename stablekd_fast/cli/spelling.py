"""Options have hyphens on the command line and underscores in YAML files, as the fields of settings have them.

The parsers know the underscores only: what is typed is translated on its way in, help and complaints on their way out.
"""

from __future__ import annotations

import copy
import difflib
import os
import re
from argparse import Action
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jsonargparse

from stablekd_fast.cli.configs import fault_of
from stablekd_fast.errors import StableKDError, first_line, printable


class _HyphenFormatter(jsonargparse.DefaultHelpFormatter):
    """Shows options with hyphens."""

    def add_usage(self, usage: str | None, actions: Iterable[Action], *rest: Any, **more: Any) -> None:
        super().add_usage(usage, map(_hyphenated, actions), *rest, **more)

    def add_argument(self, action: Action) -> None:
        super().add_argument(_hyphenated(action))


class Parser(jsonargparse.ArgumentParser):
    """A parser whose help shows hyphens, and which raises jsonargparse.ArgumentError where it cannot parse.

    The parsers that jsonargparse makes for itself, as for `--optimizer.help`, are of this class too.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"exit_on_error": False, "formatter_class": _HyphenFormatter, **settings})

    def parse_path(self, path: str | os.PathLike[str], *rest: Any, **more: Any) -> jsonargparse.Namespace:
        fault = fault_of(path)
        if fault is not None:
            self.error(f"{printable(path)} cannot be read as a config: {fault}.")
        return super().parse_path(path, *rest, **more)


def _hyphenated(action: Action) -> Action:
    """Return a copy for display."""
    shown = copy.copy(action)
    shown.option_strings = [option.replace("_", "-") for option in action.option_strings]
    return shown


def underscored(word: str) -> str:
    """Translate a word of the command line for the parsers. Options may be typed with hyphens or underscores."""
    if not word.startswith("--") or len(word) == 2:
        return word
    if word in ("--resume", "--extend"):
        return f"{word}=true"
    name, equals, value = word[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def reason_of(error: Exception) -> str:
    """Return why settings cannot be made of values that were parsed: our own sentence, where one is behind the error.

    jsonargparse lists what each type of a union says of a value.
    """
    behind: BaseException | None = error
    while behind is not None and not isinstance(behind, StableKDError):
        behind = behind.__cause__ or behind.__context__
    if behind is not None:
        return str(behind)
    said = re.search(r"^ *- ((?!Expected a).*)$", str(error), re.MULTILINE)
    return said[1] if said else first_line(error)


def explained(error: Exception, commands: Mapping[str, Parser], words: Sequence[str]) -> str:
    """Return a parser's complaint about `words`, with options as they are typed.

    The nearest valid name is added to an unknown one: an option for an option, a key for a key of a YAML file.
    """
    message = str(error)
    command = next((name for name in (" ".join(words[:2]), *words) if name in commands), None)
    if command is not None:
        options = _options(commands[command])
        missing = rf"\b{re.escape(command.replace(' ', '.'))}\.(\w+)"
        message = re.sub(missing, lambda found: options.get(found[1], found[1]), message) + _nearest(message, options)
    return re.sub(r"--[\w.]+", lambda option: option[0].replace("_", "-"), message)


def _nearest(message: str, options: Mapping[str, str]) -> str:
    """Return a sentence that names the option nearest to the one in the message; nothing if that one is valid."""
    typed, key = re.search(r"--([\w.]+)", message), re.search(r"option ['\"]([\w.]+)", message)
    unknown = typed or key
    if unknown is None or unknown[1] in options:
        return ""
    near = difflib.get_close_matches(unknown[1], options, 1, 0.5)
    return f". The nearest valid name is {options[near[0]] if typed else repr(near[0])}." if near else ""


def _options(parser: Parser) -> dict[str, str]:
    """Return how each option is typed, and each positional argument called, by the parser's name for it."""
    named = [action for action in parser._actions if action.dest]
    return {action.dest: f"--{action.dest}" if action.option_strings else action.dest for action in named}
