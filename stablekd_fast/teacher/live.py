"""What the teacher hands to a step: its (bridged) activations at cuts, and its logits.

A teacher output is known by a number: `k` below the number of cuts is the activation after block `k`, the number of
cuts itself stands for the logits.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping
from typing import Protocol

from torch import Tensor

from stablekd_fast.blocks import PairedBlocks
from stablekd_fast.data import Batch
from stablekd_fast.execution.capture import CAPTURED, Runner, make_runner


class Teacher(Protocol):
    """Serves the outputs that the steps of a stage want."""

    def outputs(self, wanted: Collection[int], images: Tensor | None, batch: Batch) -> dict[int, Tensor]:
        """Return the wanted outputs on `images` `[N, C, H, W]`, which are those of `batch` on the device."""
        ...

    def needs_images(self, wanted: Collection[int], sample_ids: Tensor, view: int) -> bool:
        """Whether `outputs` will need the images of these samples, int64 `[N]`, in this view."""
        ...

    def ahead(self, batches: Iterable[Batch], wanted: Collection[int]) -> Iterator[Batch]:
        """Return the same batches; what can be read for the next one while this one trains is read meanwhile."""
        ...

    def fill(self, stored: Collection[int]) -> None:
        """Store the outputs `stored` from now on, where several processes share a cache, and take up what the others
        have stored since."""
        ...

    def settle(self) -> None:
        """Wait until all is stored that was served and is kept."""
        ...

    def close(self) -> None:
        """Let go of files and graphs."""
        ...


class LiveTeacher:
    """One pass of the live teacher, as far as needed. No teacher block runs twice.

    Once the same outputs are wanted twice in a row, the pass is captured by `capture` (see `capture.py`); what it gives
    then is overwritten by the next pass.
    """

    def __init__(self, paired: PairedBlocks, capture: str = "eager", *, fall_back: bool = True) -> None:
        self.paired, self.capture, self.fall_back = paired, capture, fall_back
        self._wanted: Hashable = None
        self._inputs: list[Tensor] = []
        self._runner: Runner | None = None

    def outputs(
        self, images: Tensor, wanted: Collection[int], known: Mapping[int, Tensor] | None = None
    ) -> dict[int, Tensor]:
        """Return the wanted outputs, going on from `known` ones; see `PairedBlocks.teacher_outputs`."""
        known = dict(known or {})
        if self.capture not in CAPTURED:
            return self.paired.teacher_outputs(images, wanted, known)
        given = [images, *known.values()]
        key = (frozenset(wanted), tuple(known), tuple((x.shape, x.stride(), x.dtype) for x in given))
        if key != self._wanted:
            self.close()
            self._wanted = key
            return self.paired.teacher_outputs(images, wanted, known)
        runner = self._runner or self._begin(given, sorted(wanted), list(known))
        for buffer, value in zip(self._inputs, given):
            buffer.copy_(value)
        return runner.run()[0]

    def _begin(self, given: list[Tensor], wanted: list[int], known: list[int]) -> Runner:
        self._inputs = [value.clone() for value in given]
        images, *rest = self._inputs

        def body() -> dict[int, Tensor]:
            return self.paired.teacher_outputs(images, wanted, dict(zip(known, rest)))

        self._runner = make_runner(self.capture, [body], [], images.device, fall_back=self.fall_back)
        return self._runner

    def close(self) -> None:
        if self._runner is not None:
            self._runner.close()
        self._wanted, self._runner, self._inputs = None, None, []


class Relay:
    """The live teacher alone serves all blocks."""

    def __init__(self, paired: PairedBlocks, live: LiveTeacher | None = None) -> None:
        self.live = live or LiveTeacher(paired)

    def outputs(self, wanted: Collection[int], images: Tensor | None, batch: Batch | None = None) -> dict[int, Tensor]:
        if not wanted:
            return {}
        assert images is not None, "needs_images asked for them"
        return self.live.outputs(images, wanted)

    def needs_images(self, wanted: Collection[int], sample_ids: Tensor, view: int) -> bool:
        return bool(wanted)

    def ahead(self, batches: Iterable[Batch], wanted: Collection[int]) -> Iterator[Batch]:
        return iter(batches)

    def fill(self, stored: Collection[int]) -> None:
        """Nothing is stored."""

    def settle(self) -> None:
        """Nothing is stored."""

    def close(self) -> None:
        self.live.close()
