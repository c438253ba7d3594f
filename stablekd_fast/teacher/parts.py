"""The live teacher in parts: each place of a mesh runs the blocks beside its own groups, and hands its activation
on."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from stablekd_fast.blocks import PairedBlocks
from stablekd_fast.data import Batch
from stablekd_fast.distributed.layout import Layout
from stablekd_fast.distributed.ranks import Ranks

_UNDER_WAY = 2
"""Activations that a rank may be ahead of the next one."""


class TeacherPart:
    """The teacher's blocks `first` to `last`, those of this rank's groups. What enters comes from the rank before, what
    leaves goes to the rank behind, while both go on training."""

    def __init__(
        self, paired: PairedBlocks, layout: Layout, groups: list[list[int]], ranks: Ranks, device: torch.device
    ) -> None:
        own = [groups[number] for number in layout.groups_of(ranks.rank)]
        place = layout.block_of(ranks.rank)
        self.paired, self.ranks, self.device = paired, ranks, device
        self.first, self.last = own[0][0], own[-1][-1]
        self.before = ranks.rank - layout.data if place > 0 else None
        self.behind = ranks.rank + layout.data if place < layout.blocks - 1 else None
        self._entry: Tensor | None = None
        self._channels_last = False
        self._announced = False
        self._sent: deque[tuple[dist.Work, Tensor]] = deque()

    @torch.no_grad()
    def outputs(self, wanted: Collection[int], images: Tensor | None, batch: Batch) -> dict[int, Tensor]:
        """The wanted outputs, all of which are this part's own or the one that enters it."""
        found: dict[int, Tensor] = {}
        x = images if self.before is None else self._receive(self.before, len(batch.labels))
        assert x is not None, "needs_images asked for them"
        with self.paired.precision.applied(x.device):
            if self.before is not None:
                found[self.first - 1] = self._bridged(self.first - 1, x)
            for k in range(self.first, self.last + 1):
                x = self.paired.serving_blocks[k](x)
                found[k] = self._bridged(k, x)
        if self.behind is not None:
            self._send(x, self.behind)
        return {k: found[k] for k in wanted}

    def needs_images(self, wanted: Collection[int], sample_ids: Tensor, view: int) -> bool:
        return self.before is None

    def ahead(self, batches: Iterable[Batch], wanted: Collection[int]) -> Iterator[Batch]:
        return iter(batches)

    def fill(self, stored: Collection[int]) -> None:
        """Nothing is stored here."""

    def settle(self) -> None:
        """Nothing is stored here."""

    def close(self) -> None:
        """Wait until all that was sent has arrived."""
        while self._sent:
            self._finish_oldest()

    def _bridged(self, k: int, x: Tensor) -> Tensor:
        bridge = self.paired.bridge_after(k)
        return x if bridge is None else bridge(x)

    def _send(self, x: Tensor, to: int) -> None:
        channels_last = _channels_last(x)
        dense = x.permute(0, 2, 3, 1) if channels_last else x.contiguous()
        if not self._announced:
            with self.ranks.meeting(f"rank {to} is told of the teacher's activation"):
                dist.send_object_list([(tuple(dense.shape[1:]), dense.dtype, channels_last)], to)
            self._announced = True
        while len(self._sent) >= _UNDER_WAY:
            self._finish_oldest()
        self.ranks.other_bytes += dense.nbytes
        sending = dist.isend(dense, to)
        assert sending is not None, "this rank is in the group"
        self._sent.append((sending, dense))

    def _receive(self, sender: int, count: int) -> Tensor:
        with self.ranks.meeting(f"rank {sender} hands over the teacher's activation"):
            if self._entry is None:
                told: list = [None]
                dist.recv_object_list(told, sender)
                shape, dtype, self._channels_last = told[0]
                self._entry = torch.empty((count, *shape), dtype=dtype, device=self.device)
            dist.recv(self._entry, sender)
        return self._entry.permute(0, 3, 1, 2) if self._channels_last else self._entry

    def _finish_oldest(self) -> None:
        with self.ranks.meeting(f"rank {self.behind} takes the teacher's activation"):
            self._sent.popleft()[0].wait()


def _channels_last(x: Tensor) -> bool:
    """Whether `[N, H, W, C]` is the order in memory, so that it can be sent as it lies."""
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
