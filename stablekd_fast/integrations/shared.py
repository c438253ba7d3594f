"""The blocks and rows that wrappers of teacher and student share in a loop that is not the engine's."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import cast

from torch import Tensor, nn

from stablekd_fast.blocks import PairedBlocks, pair_blocks
from stablekd_fast.errors import ConfigError
from stablekd_fast.integrations.rows import TeacherRows
from stablekd_fast.integrations.views import SampleViews


class SharedBlocks:
    """The networks cut into blocks and the teacher's outputs for a batch, shared by the wrappers of both.

    Args:
        cuts: modules after which to cut, in order; (teacher's, student's) where they differ. Wrapped models offer what
            they give there to `forward_hook` under these names; where widths differ, the teacher's is bridged to the
            student's.
        bridge: see `pair_blocks`. Bridges are fitted to the first batch.
        views: the training data, if the teacher's outputs are to be kept.
        directory: where they are kept on disk, by sample and view. They are used again by runs in which all is the
            same.
        codec, logits: how exactly, see `CacheSettings`. With fp32 a run from rows has the numbers of one without.
        disk_budget: most bytes in the directory, e.g. 200GB.
    """

    def __init__(
        self,
        cuts: Sequence[str | Sequence[str]] = (),
        *,
        bridge: str = "select",
        views: SampleViews | None = None,
        directory: str | None = None,
        codec: str = "fp32",
        logits: str = "fp32",
        disk_budget: str | None = None,
    ) -> None:
        self.cuts = [(cut, cut) if isinstance(cut, str) else cast(tuple[str, str], tuple(cut)) for cut in cuts]
        self.bridge, self.rows = bridge, None
        if directory:
            if views is None:
                raise ConfigError(
                    f"The teacher's outputs are to be kept in {directory}, but random views without keys cannot be "
                    "found again; give the training data as SampleViews, and here views: that object."
                )
            self.rows = TeacherRows(views, directory, codec, logits, disk_budget)
        self.teacher: nn.Module | None = None
        self.student: nn.Module | None = None
        self._forget()

    def _forget(self) -> None:
        self.paired: PairedBlocks | None = None
        self._batch: tuple[Tensor, Mapping[int, Tensor]] | None = None

    def attach(self, **models: nn.Module) -> None:
        """Take the `teacher=` or the `student=`. Blocks and rows stay where it is the model of the stage before."""
        for role, model in models.items():
            if getattr(self, role) is not model:
                self.close()
                setattr(self, role, model)

    def teacher_outputs(self, images: Tensor, keys: Mapping[str, Tensor] | None) -> list[Tensor]:
        """Return what the teacher gives at every cut, and its logits."""
        if self.paired is None:
            self.paired = self._pair(images)
        if self.rows is None:
            known = self.paired.teacher_outputs(images)
        else:
            known = self.rows.outputs(self.paired, images, keys)
        self._batch = images, known
        return [known[k] for k in range(len(self.paired))]

    def student_outputs(self, groups: Sequence[Sequence[int]], images: Tensor) -> list[Tensor]:
        """Return what the student gives at every cut, and its logits.

        Groups begin at the teacher's outputs for the same images.
        """
        if self.paired is None or self._batch is None or self._batch[0] is not images:
            raise ConfigError(
                "StableKDStudent met images that StableKDTeacher has not; give both wrappers one SharedBlocks."
            )
        return self.paired.student_outputs(groups, images, self._batch[1])

    def close(self) -> None:
        """Let go of the files of rows."""
        if self.rows is not None:
            self.rows.close()
        self._forget()

    def _pair(self, images: Tensor) -> PairedBlocks:
        assert self.teacher is not None
        # Where no student is known yet, the teacher's own outputs are wanted: a copy is cut at the same places.
        student = copy.deepcopy(self.teacher) if self.student is None else self.student
        return pair_blocks(self.teacher, student, images, self.cuts, bridge=self.bridge)
