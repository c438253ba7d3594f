"""What the teacher hands to a step: its (bridged) activations at cuts, and its logits.

A teacher output is known by a number: `k` below the number of cuts is the activation after block `k`, the number of cuts
itself stands for the logits.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Protocol

from torch import Tensor

from stablekd_fast.blocks import PairedBlocks
from stablekd_fast.data import Batch


class Teacher(Protocol):
    """Serves the outputs that the steps of a stage want."""

    def outputs(self, wanted: Collection[int], images: Tensor, batch: Batch | None = None) -> dict[int, Tensor]:
        """The wanted outputs on `images` `[N, C, H, W]`, which are those of `batch` on the device."""

    def ahead(self, batches: Iterable[Batch], wanted: Collection[int]) -> Iterator[Batch]:
        """The same batches; what can be read for the next one while this one trains is read meanwhile."""


    def close(self) -> None:
        """Let go of files."""


class Relay:
    """The live teacher: one pass per batch, as far as needed, serves all blocks. No teacher block runs twice."""

    def __init__(self, paired: PairedBlocks) -> None:
        self.paired = paired

    def outputs(self, wanted: Collection[int], images: Tensor, batch: Batch | None = None) -> dict[int, Tensor]:
        return self.paired.teacher_outputs(images, wanted)

    def ahead(self, batches: Iterable[Batch], wanted: Collection[int]) -> Iterator[Batch]:
        return iter(batches)

    def close(self) -> None:
        pass
