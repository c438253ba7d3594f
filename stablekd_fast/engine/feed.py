"""Batches on their way into a stage's inputs, with what the teacher gives for them."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import Tensor

from stablekd_fast.data import Batch
from stablekd_fast.engine.inputs import StageInputs, fill_inputs, served
from stablekd_fast.execution.side import Side
from stablekd_fast.teacher.live import Teacher


class Feed:
    """Makes one batch after the other ready: its images, labels and rows on the device, and the teacher's pass.

    On a GPU this is done by `side`, beside the step before. Batches are handed over one by one: `fetch`, `serve`,
    `load`.
    """

    def __init__(self, teacher: Teacher, batches: Iterable[Batch], wanted: Collection[int], side: Side) -> None:
        self.teacher, self.wanted, self.side = teacher, wanted, side
        self._batches = iter(teacher.ahead(batches, wanted))
        self._batch: Batch | None = None
        self._served: tuple[Batch, dict[int, Tensor]] | None = None

    def fetch(self) -> Batch | None:
        """Take the next batch; None where there is none."""
        self.side.begin()
        with self.side.ahead():
            self._batch = next(self._batches, None)
        return self._batch

    def serve(self, inputs: StageInputs) -> None:
        """Bring the batch that was fetched to the device of `inputs`, and have the teacher serve it."""
        assert self._batch is not None, "fetch comes first"
        with self.side.ahead():
            self._served = served(self.teacher, self.wanted, self._batch, inputs.device)

    def load(self, inputs: StageInputs) -> None:
        """Copy what was served into `inputs`."""
        assert self._served is not None, "serve comes first"
        self.side.join()
        fill_inputs(inputs, *self._served)
        self.side.taken()
        self._batch = self._served = None
