"""Losses by name. An objective is one file that registers a name, a config dataclass, and a function.

Four places take objectives:

- `feature`: `(config, student, target, channel_axis) -> (loss, gradient)` at a cut, both `[N, ...]` of one shape; one
  that divides by something of the whole batch registers how to find it, and takes it as a further argument;
- `logits`: `(config, student, teacher or None, labels or None) -> (loss, gradient)` at the head, `[N, classes]`;
- `auxiliary`: a class, an `Auxiliary`, for all that needs more than one tensor of student and teacher each;
- `synthesis`: a class, a `Synthesis`, no loss of the student but what makes its images.

Losses at the first two come already weighted, as 0-dim tensors, together with their gradient with respect to the
student's tensor: a step starts backward from the gradients, so no further pass over the feature maps is made.
`differentiated` makes such a function of one that gives the loss alone.

A function may take a keyword `upstream`, a 0-dim tensor or None, by which loss and gradient are then to be multiplied
before they are rounded to the student's type: the gradient of a mean over a large feature map is too small for float16,
and the loss scale of a step comes too late behind it. The gradient of a function that does not take it is multiplied
afterwards. What is reported is the loss without `upstream`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar, overload

import torch
from torch import Tensor

from stablekd_fast.errors import ConfigError, nearest
from stablekd_fast.objectives.auxiliary import Auxiliary, Facts, wide
from stablekd_fast.objectives.synthesis import SynthesisObjective

LossWithGradient = Callable[..., tuple[Tensor, Tensor]]
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True)
class FeatureObjective:
    """A loss at a cut, with its options bound: `config`, an instance of the objective's dataclass."""

    config: Any
    function: LossWithGradient
    takes_upstream: bool
    whole_batch_function: Callable[[Any, Tensor], Tensor | None]
    any_width: bool = False
    """Whether the target may have another number of channels than the student."""

    def __call__(
        self,
        student: Tensor,
        target: Tensor,
        channel_axis: int,
        power: Tensor | None = None,
        upstream: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the weighted loss, and its gradient with respect to the student times `upstream`, a 0-dim tensor.

        Student and target are `[N, ...]` of one shape. Where they are a part of a batch, `power` is what `whole_batch`
        gives for all of it.
        """
        given = (self.config, student, target, channel_axis, *(() if power is None else (power,)))
        return _scaled_inside(self.function, given, upstream, self.takes_upstream)

    def whole_batch(self, target: Tensor) -> Tensor | None:
        """Return the 0-dim tensor that the loss needs of all targets of a batch; None where it needs nothing."""
        return self.whole_batch_function(self.config, target)


@dataclasses.dataclass(frozen=True)
class LogitObjective:
    """A loss at the head, with its options bound: `config`, an instance of the objective's dataclass."""

    config: Any
    function: LossWithGradient
    takes_upstream: bool
    name: str = "kd"
    relates: bool = False
    """Whether the loss compares the samples of a batch, so that it is no mean over them."""
    needs_classes: bool = False
    """Whether labels must be classes, and cannot be the probabilities of mixed images."""

    def __call__(
        self, student: Tensor, teacher: Tensor | None, labels: Tensor | None, upstream: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the weighted loss, and its gradient with respect to the student times `upstream`, a 0-dim tensor;
        logits are `[N, classes]`."""
        given = (self.config, student, teacher, labels)
        return _scaled_inside(self.function, given, upstream, self.takes_upstream)


@dataclasses.dataclass(frozen=True)
class AuxiliaryObjective:
    """An auxiliary loss with its options bound, to be made for a run."""

    name: str
    config: Any
    kind: type[Auxiliary]

    def build(self, facts: Facts, seed: int) -> Auxiliary:
        """Make it for a run, on the run's device. Its first weights follow from `seed` alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.kind(self.config, facts).to(facts.device)


def differentiated(function: Callable[..., Tensor]) -> LossWithGradient:
    """Return a function for `register` made of one that gives the weighted loss alone, 0-dim.

    The function gets its tensors in float32 at least, and products of them are taken so.
    """

    def with_gradient(config: Any, student: Tensor, *others: Any, upstream: Tensor | None = None) -> tuple:
        with torch.enable_grad(), torch.autocast(student.device.type, enabled=False):
            leaf = student.detach().requires_grad_(True)
            loss = function(config, *(wide(x) if isinstance(x, Tensor) else x for x in (leaf, *others)))
            loss = loss if upstream is None else loss * upstream
            (gradient,) = torch.autograd.grad(loss, leaf)
        return loss.detach(), gradient

    with_gradient.__name__, with_gradient.__doc__ = function.__name__, function.__doc__
    return with_gradient


def _scaled_inside(
    function: LossWithGradient, given: tuple, upstream: Tensor | None, takes_upstream: bool
) -> tuple[Tensor, Tensor]:
    if upstream is None:
        return function(*given)
    if takes_upstream:
        loss, gradient = function(*given, upstream=upstream)
        return loss / upstream, gradient
    loss, gradient = function(*given)
    return loss, (gradient.float() * upstream).to(gradient.dtype)  # a scale of 2^16 is infinite in float16


class _Registered(NamedTuple):
    config: type[Any]
    function: Any
    whole_batch: Callable[[Any, Tensor], Tensor | None]
    any_width: bool
    relates: bool
    needs_classes: bool


_REGISTRY: dict[str, dict[str, _Registered]] = {"feature": {}, "logits": {}, "auxiliary": {}, "synthesis": {}}


def _nothing(config: Any, target: Tensor) -> None:
    return None


def register(
    place: Literal["feature", "logits", "auxiliary", "synthesis"],
    name: str,
    config: type[Any],
    whole_batch: Callable[[Any, Tensor], Tensor | None] = _nothing,
    *,
    any_width: bool = False,
    relates: bool = False,
    needs_classes: bool = False,
) -> Callable[[Function], Function]:
    """Return a decorator that makes a function, or a class of `Auxiliary` or `Synthesis`, known as objective `name` at
    `place`.

    `whole_batch(config, target)`: a 0-dim tensor that the loss needs of all targets of a batch, whose mean over equal
    parts is that of the whole; None where the loss of a batch is the mean of its parts' losses. `any_width`: at a cut,
    the target may have other channels than the student. At the head, `relates`: the loss compares samples;
    `needs_classes`: labels must be classes int64 `[N]`, no probabilities.
    """

    def add(function: Function) -> Function:
        _REGISTRY[place][name] = _Registered(config, function, whole_batch, any_width, relates, needs_classes)
        return function

    return add


def options() -> list[tuple[str, str, type[Any]]]:
    """Return place, name and dataclass of options of every objective."""
    return [(place, name, entry.config) for place, names in _REGISTRY.items() for name, entry in names.items()]


@overload
def objective(place: Literal["feature"], name: str, options: dict[str, Any] | None = None) -> FeatureObjective: ...
@overload
def objective(place: Literal["logits"], name: str, options: dict[str, Any] | None = None) -> LogitObjective: ...
@overload
def objective(place: Literal["auxiliary"], name: str, options: dict[str, Any] | None = None) -> AuxiliaryObjective: ...
@overload
def objective(place: Literal["synthesis"], name: str, options: dict[str, Any] | None = None) -> SynthesisObjective: ...
def objective(
    place: Literal["feature", "logits", "auxiliary", "synthesis"], name: str, options: dict[str, Any] | None = None
) -> FeatureObjective | LogitObjective | AuxiliaryObjective | SynthesisObjective:
    """Return the objective `name` with its options bound.

    Raises ConfigError for an unknown name or option, with the nearest valid one.
    """
    known = _REGISTRY[place]
    if name not in known:
        raise ConfigError(f"There is no {place} objective {name!r}{nearest(name, known)}.")
    entry = known[name]
    options = options or {}
    fields = [field.name for field in dataclasses.fields(entry.config)]
    for key in options:
        if key not in fields:
            raise ConfigError(f"The {place} objective {name!r} has no option {key!r}{nearest(key, fields)}.")
    config = entry.config(**options)
    if place == "auxiliary":
        return AuxiliaryObjective(name, config, entry.function)
    if place == "synthesis":
        return SynthesisObjective(name, config, entry.function)
    takes_upstream = "upstream" in inspect.signature(entry.function).parameters
    if place == "feature":
        return FeatureObjective(config, entry.function, takes_upstream, entry.whole_batch, entry.any_width)
    return LogitObjective(config, entry.function, takes_upstream, name, entry.relates, entry.needs_classes)
