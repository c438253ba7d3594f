"""Tables by row number: where each stored row lies, and what its checksum is. The C++ core reads them by address."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stablekd_fast.cache.shard import Part, Shard


class RowTables:
    """Tables over the rows of one store; `Rows` in csrc/row_store.h describes the same four.

    A table that grows is replaced by a longer one, so a reading under way can go on with those that it began with.

    Args:
        parts: the parts of a row.
        growth: the fewest row numbers by which the tables grow.
    """

    def __init__(self, parts: Sequence[Part], growth: int) -> None:
        self.places = torch.empty(0, dtype=torch.int64)
        """`[rows]`: shard << 32 | slot, or -1 for a row that is not stored."""
        self.checksums = torch.empty(0, dtype=torch.int32)
        """`[rows]`: the checksums that `checksums_of` gives."""
        self.seen = torch.empty(0, dtype=torch.uint8)
        """`[rows]`: 1 for a row whose checksum was compared before; the core sets it."""
        self.shards = torch.empty((0, 1 + len(parts)), dtype=torch.int64)
        """`[shards, 1 + parts]`: the shard's file descriptor, and where each part begins in its file."""
        self._parts, self._growth = tuple(parts), growth

    def __len__(self) -> int:
        """Rows that are stored."""
        return int((self.places >= 0).sum())

    def present(self, rows: Tensor) -> Tensor:
        """Whether each row of `rows` int64 `[N]` is stored: bool `[N]`."""
        return has_entry(self.places, rows)

    def complete(self, rows: Tensor) -> bool:
        """Whether all of `rows` int64 `[N]` are stored."""
        return have_entries(self.places, rows)

    def fresh(self, rows: Tensor) -> Tensor:
        """Positions in `rows` of those that are not stored, each row number once."""
        candidates = (~self.present(rows)).nonzero().flatten()
        first: dict[int, int] = {}
        for row, position in zip(rows[candidates].tolist(), candidates.tolist()):
            first.setdefault(row, position)
        return torch.tensor(list(first.values()), dtype=torch.int64)

    def shard_of(self, row: int) -> int:
        """The number of the shard that holds a stored row."""
        return int(self.places[row]) >> 32

    def current(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The tables as they are now, in the core's order. Whoever reads by their addresses keeps them alive."""
        return self.places, self.checksums, self.seen, self.shards

    def make_room(self, rows: int) -> None:
        """Grow so that row numbers below `rows` have entries."""
        more = rows - len(self.places)
        if more > 0:
            more = max(more, self._growth)
            self.places = torch.cat([self.places, torch.full((more,), -1)])
            self.checksums = torch.cat([self.checksums, torch.zeros(more, dtype=torch.int32)])
            self.seen = torch.cat([self.seen, torch.zeros(more, dtype=torch.uint8)])

    def add_shard(self, shard: Shard) -> None:
        """Give the shard the next number, and enter its rows."""
        line = torch.tensor([[shard.file, *(shard.starts[part.name] for part in self._parts)]])
        self.shards = torch.cat([self.shards, line])
        self.enter(len(self.shards) - 1, shard, 0)

    def enter(self, number: int, shard: Shard, first: int) -> None:
        """Enter the rows that the shard of this number has in its slots from `first` on."""
        keys = shard.keys[first : shard.used]
        if not len(keys):
            return
        self.make_room(int(keys.max()) + 1)
        self.checksums[keys] = shard.checksums[first : shard.used]
        self.places[keys] = (number << 32) + torch.arange(first, shard.used)


def has_entry(table: Tensor, rows: Tensor) -> Tensor:
    """Whether each of `rows` int64 `[N]` has an entry that is not negative in a table by row number: bool `[N]`."""
    known = rows < len(table)
    return known & (table[torch.where(known, rows, 0)] >= 0) if len(table) else known


def have_entries(table: Tensor, rows: Tensor) -> bool:
    """Whether all of `rows` int64 `[N]` have one; each batch asks it of each column."""
    return not len(rows) or (int(rows.max()) < len(table) and int(table[rows].min()) >= 0)


def indexable(values: Tensor) -> Tensor:
    """A view of the same memory that can be indexed; torch 2.6 cannot index 8-bit floats on a CPU."""
    return values.view(torch.uint8) if values.dtype.itemsize == 1 else values
