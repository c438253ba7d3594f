"""Errors that a user can act on. Each message says what was given, what is needed, and what to do."""

import difflib
from collections.abc import Iterable


class StableKDError(Exception):
    """The base of every error that is raised on purpose; the command prints its message and exits with 2."""


class ConfigError(StableKDError):
    """A setting that cannot be used."""


class DataError(StableKDError):
    """A data set, image or label that cannot be used."""


class ModelError(StableKDError):
    """A model name or weight file that cannot be used."""


class CutError(StableKDError):
    """A cut that does not exist, does not fit, or cannot be traced."""


class CheckpointError(StableKDError):
    """A checkpoint that is damaged or belongs to another run."""


class CacheError(StableKDError):
    """A cache that is damaged, or that belongs to another teacher, data set or view."""


class CacheMissing(CacheError):
    """There is no column of a cache in a folder."""


class CacheFull(CacheError):
    """There is no room for more rows: the budget is used up, or the disk is full. What is stored stays readable."""


class Interrupted(StableKDError):
    """A signal ended a run, whose state is saved where there was something to save.

    Attributes:
        signal: its number. The command exits with 128 + signal.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


class TrainingError(StableKDError):
    """Training cannot go on: a loss is not finite, memory or disk is exhausted."""


class RankError(TrainingError):
    """Another process of the run is gone, does not answer, or failed."""


class CaptureError(TrainingError):
    """A step cannot be captured or compiled: it reads device data on the host, or does what a graph cannot repeat."""


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a message that offers the valid name nearest to `word`, and lists all names."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, 1, 0.0)
    return f"; the nearest is {near[0]!r} (all: {', '.join(known)})" if near else ""


def check_range(
    settings: object, *names: str, least: float | None = None, above: float | None = None, most: float | None = None
) -> None:
    """Raise ConfigError for the first of these attributes that is below `least`, not above `above`, or over `most`."""
    limits = [("at least", least), ("greater than", above), ("at most", most)]
    words = " and ".join(f"{word} {limit:g}" for word, limit in limits if limit is not None)
    for name in names:
        value = getattr(settings, name)
        fits = (least is None or value >= least) and (above is None or value > above)
        if not fits or (most is not None and value > most):
            raise ConfigError(f"{name}={value} was given; it must be {words}.")


def printable(text: object) -> str:
    """A text or path as it can be printed and written to any file: bytes of a name that are no UTF-8 stand as \\xNN."""
    return str(text).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def first_line(error: BaseException) -> str:
    """What an error of another library says first, to be quoted in a sentence; its name if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
