"""Losses by name. An objective is one file that registers a name, a config dataclass, and a function.

Two places take objectives:

- `feature`: `(config, student, target, channel_axis) -> (loss, gradient)` at a cut, both `[N, ...]` of one shape; one
  that
  divides by something of the whole batch registers how to find it, and takes it as a further argument;
- `logits`: `(config, student, teacher or None, labels or None) -> (loss, gradient)` at the head, `[N, classes]`.

Losses come already weighted, as 0-dim tensors, together with their gradient with respect to the student's tensor:
a step starts backward from the gradients, so no further pass over the feature maps is made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor

from stablekd_fast.errors import ConfigError, nearest

_REGISTRY: dict[str, dict[str, tuple[type, Callable, Callable]]] = {"feature": {}, "logits": {}}


def _nothing(config: Any, target: Tensor) -> None:
    return None


def register(
    place: str, name: str, config: type, whole_batch: Callable[[Any, Tensor], Tensor | None] = _nothing
) -> Callable[[Callable], Callable]:
    """Decorator that makes a function known as objective `name` at `place` (`"feature"` or `"logits"`).

    `whole_batch(config, target)`: a 0-dim tensor that the loss needs of all targets of a batch, whose mean over equal
    parts is that of the whole; None where the loss of a batch is the mean of its parts' losses.
    """

    def add(function: Callable) -> Callable:
        _REGISTRY[place][name] = (config, function, whole_batch)
        return function

    return add


def objective(place: str, name: str, options: dict[str, Any] | None = None) -> Callable:
    """The objective's function with its options bound, and as its attribute `whole_batch` that of `register`.

    Raises ConfigError for an unknown name or option, with the nearest valid one.
    """
    known = _REGISTRY[place]
    if name not in known:
        raise ConfigError(f"There is no {place} objective {name!r}{nearest(name, known)}.")
    config_type, function, whole_batch = known[name]
    options = dict(options or {})
    fields = [field.name for field in dataclasses.fields(config_type)]
    for key in options:
        if key not in fields:
            raise ConfigError(f"The {place} objective {name!r} has no option {key!r}{nearest(key, fields)}.")
    config = config_type(**options)

    def bound(*tensors):
        return function(config, *tensors)

    bound.config = config
    bound.whole_batch = lambda target: whole_batch(config, target)
    return bound
