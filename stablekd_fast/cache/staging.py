"""One piece of main memory for a batch's rows of all columns, so that they go to the device in one copy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from stablekd_fast.cache.shard import Part

_ALIGNMENT = 512
"""Where tensors begin, as those that torch allocates on a GPU do."""


class Staging:
    """Memory for `count` rows of each output, whose `parts` lie one behind the other; `pinned` for a GPU.

    `parts[k]` are the tensors `[count, ...]` of output `k`, contiguous, to be filled.
    """

    def __init__(self, parts: Mapping[int, Sequence[Part]], count: int, *, pinned: bool = False) -> None:
        self._wanted, self._count = dict(parts), count
        size = sum(_room(part, count) for wanted in self._wanted.values() for part in wanted)
        self._memory = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        self.parts = self._divided(self._memory)

    def on(self, device: torch.device) -> dict[int, list[Tensor]]:
        """What is there by now, on `device`: by output the tensors `[count, ...]` of its parts. They share memory; on a
        CPU it is this one."""
        there = self._memory.to(device, non_blocking=True)
        return self.parts if there is self._memory else self._divided(there)

    def _divided(self, memory: Tensor) -> dict[int, list[Tensor]]:
        pieces = self._pieces(memory)
        return {output: [next(pieces) for _ in wanted] for output, wanted in self._wanted.items()}

    def _pieces(self, memory: Tensor) -> Iterator[Tensor]:
        at = 0
        for wanted in self._wanted.values():
            for part in wanted:
                piece = memory[at : at + self._count * part.bytes]
                yield piece.view(part.dtype).view(self._count, *part.shape)
                at += _room(part, self._count)


def _room(part: Part, count: int) -> int:
    return -(-count * part.bytes // _ALIGNMENT) * _ALIGNMENT
