"""The mesh of a stage, blocks times data: which rank trains which groups, on which part of the batch.

On the *blocks* axis ranks train different groups on the same images; decomposed groups have no gradient in common, so
nothing of it is exchanged. On the *data* axis ranks train the same groups on different parts of each batch and average
gradients. A step of the stage takes as long as its busiest rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from stablekd_fast.distributed.ranks import Ranks
from stablekd_fast.losses import rows_of


@dataclass(frozen=True)
class Layout:
    """The mesh of one stage.

    Rank `block * data + part` trains the groups whose place is `block`, on part `part` of each batch.
    """

    blocks: int = 1
    """How many ranks the mesh has on the blocks axis."""
    data: int = 1
    """How many ranks the mesh has on the data axis."""
    places: tuple[int, ...] = ()
    """Each group's place on the blocks axis."""
    seconds: tuple[float, ...] = ()
    """The seconds predicted for a step at each place; empty where nothing was measured."""
    hands_on: bool = False
    """Whether the live teacher's activations are handed on from place to place. Groups then lie in the order of their
    places."""

    @staticmethod
    def from_plain(values: dict) -> Layout:
        """The layout whose fields, as JSON types, are `values`."""
        fields = {name: value for name, value in values.items() if name != "relays"}
        fields |= {"places": tuple(values["places"]), "seconds": tuple(values["seconds"])}
        return Layout(**fields, hands_on=values["relays"])

    def plain(self) -> dict:
        """Return the fields under the names that they have in checkpoints."""
        values = asdict(self)
        values["relays"] = values.pop("hands_on")
        return values

    def block_of(self, rank: int) -> int:
        """The rank's place on the blocks axis."""
        return rank // self.data

    def part_of(self, rank: int) -> int:
        """The rank's place on the data axis: which part of each batch it trains on."""
        return rank % self.data

    def owner(self, group: int) -> int:
        """The first rank that trains a group."""
        return self.places[group] * self.data

    def groups_of(self, rank: int) -> list[int]:
        """The groups that a rank trains."""
        return [group for group, place in enumerate(self.places) if place == self.block_of(rank)]

    def averaging(self, ranks: Ranks, device: torch.device) -> Averaging | None:
        """What averages gradients over this rank's data axis; None where that is one rank."""
        if self.data == 1:
            return None
        return Averaging(ranks, ranks.data_group(self.blocks, self.data, device), self.data)


@dataclass(frozen=True)
class Averaging:
    """Takes means over the `count` ranks of a data axis, whose process group is `group`."""

    ranks: Ranks
    group: ProcessGroup
    count: int

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite the tensors with their means."""
        self.ranks.average_gradients(tensors, self.group, self.count)

    def gather(self, rows: Tensor) -> tuple[Tensor, int]:
        """Return the rows `[N, ...]` of all ranks, as many of each, and at which place this rank's begin."""
        self.ranks.other_bytes += rows.nbytes
        with self.ranks.meeting("rows of a batch are gathered", self.group):
            return rows_of(self.group, rows)
