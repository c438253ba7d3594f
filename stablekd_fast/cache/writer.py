"""Rows on their way into their columns: a thread of its own stores them, while the teacher goes on."""

from __future__ import annotations

import time
import warnings
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch
from torch import Tensor

from stablekd_fast.cache.columns import Column
from stablekd_fast.errors import CacheError, CacheFull
from stablekd_fast.execution.moments import HostCopy, given_up

BATCHES_BEHIND = 2
"""So many batches may wait to be stored, the one that is being stored among them."""
_POLLING_SECONDS = 0.0005

_Refused = list[tuple[Column, CacheFull]]


@dataclass(frozen=True)
class _Batch:
    """Rows that were handed over, int64 `[N]`, and the columns that had no room for them, known once all are stored."""

    rows: Tensor
    stored: Future[_Refused]


class RowWriter:
    """Stores rows of outputs that lie on `device`, in the order in which they are handed over.

    What the thread meets is raised, or told, by the next call of `put`, `settle` or `close`. Until a batch is stored
    nobody finds its rows: whoever asks for some that may be under way calls `await_rows` first. All other methods are
    called by one thread.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._thread = ThreadPoolExecutor(1, "rows on their way into columns")  # it begins with the first batch
        self._under_way: deque[_Batch] = deque()

    def put(self, rows: Tensor, kept: Sequence[tuple[Column, Sequence[Tensor]]]) -> None:
        """Hand over the rows with the numbers `rows` int64 `[N]`: for each column its parts `[N, ...]`, which are
        copied and may be overwritten afterwards. Waits while `BATCHES_BEHIND` batches are under way.

        A column that has no room takes no more rows, which a warning tells. Raises CacheError where the system refuses
        the thread, and what the thread met when it stored earlier rows.
        """
        self._take(BATCHES_BEHIND - 1)
        columns, copy = [column for column, _ in kept], HostCopy([part for _, parts in kept for part in parts])
        try:
            stored = self._thread.submit(self._store, rows, columns, copy)
        except RuntimeError as error:
            raise CacheError(
                f"The system refused the thread that stores rows ({error}): the number of processes or the memory "
                "allowed is used up. End other processes, or raise the limit (`ulimit -u`)."
            ) from error
        self._under_way.append(_Batch(rows, stored))

    def await_rows(self, rows: Tensor) -> bool:
        """Wait for the batches under way that have some of `rows` int64 `[N]`. Returns whether there were any."""
        found = [batch.stored for batch in list(self._under_way) if torch.isin(rows, batch.rows).any()]
        wait(found)
        return bool(found)

    def settle(self) -> None:
        """Wait until all that was handed over is stored."""
        self._take(0)

    def close(self) -> None:
        """Settle, and end the thread; a device that is given up is not waited for."""
        try:
            self.settle()
        finally:
            self._thread.shutdown()

    def _take(self, most: int) -> None:
        """Wait until at most `most` batches are under way, and tell what became of the others."""
        while self._under_way and (len(self._under_way) > most or self._under_way[0].stored.done()):
            for column, error in self._under_way.popleft().stored.result():
                _tell(column, error)

    def _store(self, rows: Tensor, columns: Sequence[Column], copy: HostCopy) -> _Refused:
        """Store a batch, in the thread. A column that fails in whatever way takes no more rows."""
        while not copy.arrived:
            if given_up(self._device):  # it may never come so far
                return []
            time.sleep(_POLLING_SECONDS)
        values, refused = iter(copy.values()), []
        for column in columns:
            parts = [next(values) for _ in column.format.parts]
            if column.closed:
                continue
            try:
                column.rows.put(rows, parts)
            except CacheFull as error:
                column.closed = True
                refused.append((column, error))
            except BaseException:
                for other in columns:
                    other.closed = True
                raise
        return refused


def store_now(column: Column, rows: Tensor, parts: Sequence[Tensor]) -> None:
    """Store rows at once, in a memory where copying them costs nobody time; a column without room is told likewise."""
    try:
        column.rows.put(rows, parts)
    except CacheFull as error:
        column.closed = True
        _tell(column, error)


def _tell(column: Column, error: CacheFull) -> None:
    warnings.warn(
        f"{column.name} is cached no further, the live teacher serves what is missing: {error}",
        RuntimeWarning,
        stacklevel=4,
    )
