"""Images that are made instead of read: what makes them, and what it is told of the run.

A synthesis is asked by the loop between two steps, every so many of them, and may ask teacher and student in return.
What it makes goes into a bank of images, from which batches are drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stablekd_fast.errors import check_range

Network = Callable[[Tensor], Tensor]
"""Maps normalised images `[N, 3, H, W]` to logits `[N, classes]`, differentiable with respect to the images."""


@dataclass(frozen=True)
class Rounds:
    """When images are made, and how many of them are kept: what the options of every synthesis begin with."""

    bank: int = 10_000
    """Images that are kept; a new one takes the place of the oldest. An epoch shows so many."""
    images: int = 200
    """Images that are made in one round."""
    every: int = 50
    """Steps of the student between two rounds."""
    warm_up: int = 20
    """Rounds before the first step."""

    def __post_init__(self) -> None:
        check_range(self, "bank", "images", "every", above=0)
        check_range(self, "warm_up", least=0)


@dataclass(frozen=True)
class SynthesisFacts:
    """What is known of a run when its synthesis is made."""

    classes: int
    size: tuple[int, int]
    """Height and width of the images."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    """By which the networks' images are normalised, per channel of 0 to 1."""
    padding: int
    """By so many pixels, padded with black, the student's views are shifted."""
    flip: bool
    """Whether one half of the student's views are mirrored."""
    norms: list[nn.Module]
    """The teacher's batch norms that have running statistics."""
    device: torch.device


class Synthesis(Protocol):
    """Makes images in rounds. A run that is resumed makes the same ones: all that a round leaves for the next one is in
    `state`, and all that it draws comes from the generator that it is given."""

    def make(self, teacher: Network, student: Network, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return images float32 `[N, 3, H, W]` from 0 to 1, not normalised, and their classes int64 `[N]`.

        Both networks are in evaluation mode. Their parameters get no gradients.
        """
        ...

    def state(self) -> dict[str, Tensor]:
        """Return all that changes from round to round, by name."""
        ...

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        ...


@dataclass(frozen=True)
class SynthesisObjective:
    """A synthesis with its options bound, to be made for a run."""

    name: str
    config: Any
    """Its options, a dataclass that begins with those of `Rounds`."""
    kind: Callable[[Any, SynthesisFacts], Synthesis]

    def build(self, facts: SynthesisFacts, seed: int) -> Synthesis:
        """Make it for a run. Its first weights follow from `seed` alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.kind(self.config, facts)
