"""Methods by name: which losses train the student, and where; how its blocks train is said by `engine/schedule.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from stablekd_fast.errors import ConfigError, nearest


@dataclass(frozen=True)
class Method:
    """What a method stands for. Losses are named as in the registry; a setting of the run goes before them.

    `align`: at which cuts features are aligned; None leaves it to the setting of this name.
    """

    align: Literal["none", "ends", "all"] | None = "none"
    feature: str = "mse"
    logits: str = "kd"
    auxiliary: str | None = None
    synthesis: str | None = None
    """What makes the images of a run without data."""
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Options other than the losses' own defaults: by place, `feature`, `logits`, `auxiliary` or
    `synthesis`."""
    needs_teacher: bool = True
    reuses_classifier: bool = False
    """Whether the student is its encoder, a projector and the teacher's classifier; see `blocks/reused.py`."""
    stages: Literal["decomposed", "apart", "end to end"] = "end to end"
    """Whether blocks train alone and are merged, train alone throughout, or train as one from the start."""


METHODS: dict[str, Method] = {
    "stablekd": Method(align=None, stages="decomposed"),
    "kd": Method(),
    "kd+features": Method(align="all"),
    "blocks": Method(align="ends", stages="apart"),
    "ce": Method(needs_teacher=False),
}


def add_method(name: str, method: Method) -> None:
    """Make a method known by its name."""
    METHODS[name] = method


def method_named(name: str) -> Method:
    """Return a method. Raises ConfigError for an unknown name."""
    if name not in METHODS:
        raise ConfigError(f"method {name!r} does not exist{nearest(name, METHODS)}.")
    return METHODS[name]
