"""Which rank trains which groups of a stage, on which part of the batch: a mesh of blocks times data, chosen by costs.

On the *blocks* axis ranks train different groups on the same images; decomposed groups have no gradient in common, so
nothing of it is exchanged. On the *data* axis ranks train the same groups on different parts of each batch and average
gradients. A step of the stage takes as long as its busiest rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from stablekd_fast.distributed.ranks import Ranks, average


@dataclass(frozen=True)
class Layout:
    """One stage's mesh. Rank `block * data + part` trains the groups whose `places` are `block`, on its part of each
    batch."""

    blocks: int = 1
    data: int = 1
    places: tuple[int, ...] = ()
    """For each group its place on the blocks axis."""
    seconds: tuple[float, ...] = ()
    """Predicted for a step at each place; empty where nothing was measured."""
    relays: bool = False
    """Whether the teacher's activations are passed on from place to place. Groups then lie in the order of their
    places."""

    @staticmethod
    def from_plain(values: dict) -> Layout:
        return Layout(**{**values, "places": tuple(values["places"]), "seconds": tuple(values["seconds"])})

    def block_of(self, rank: int) -> int:
        return rank // self.data

    def part_of(self, rank: int) -> int:
        return rank % self.data

    def owner(self, group: int) -> int:
        """The first rank that trains a group."""
        return self.places[group] * self.data

    def groups_of(self, rank: int) -> list[int]:
        return [group for group, place in enumerate(self.places) if place == self.block_of(rank)]

    def averaging(self, ranks: Ranks, device: torch.device) -> Averaging | None:
        """What averages gradients over the data axis; None where there is none."""
        if self.data == 1:
            return None
        group = ranks.mesh(self.blocks, self.data, device).get_group("data")
        return Averaging(partial(average, ranks, group, self.data), group, self.data)


@dataclass(frozen=True)
class Averaging:
    """Means over the data axis: called with tensors, it overwrites them."""

    tensors: Callable[[Sequence[Tensor]], None]
    group: object
    count: int
