"""What wrappers of teacher and student share in a loop that is not the engine's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from stablekd_fast.blocks import PairedBlocks, pair_blocks
from stablekd_fast.cache.columns import Columns, Kept, Plan
from stablekd_fast.cache.settings import CacheSettings
from stablekd_fast.data import Batch
from stablekd_fast.errors import ConfigError
from stablekd_fast.integrations.views import SAMPLE, VIEW, SampleViews
from stablekd_fast.teacher.cached import CachedTeacher


class SharedBlocks:
    """What the wrappers of teacher and student share: the networks cut into blocks, and the teacher's outputs for a
    batch.

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
        self.cuts = [(cut, cut) if isinstance(cut, str) else tuple(cut) for cut in cuts]
        self.bridge, self.views = bridge, views
        self.settings = (
            CacheSettings("all", directory, disk_budget, codecs=[codec], logits=logits) if directory else None
        )
        if directory and views is None:
            raise ConfigError(
                f"The teacher's outputs are to be kept in {directory}, but random views without keys cannot be found "
                "again; "
                "give the training data as SampleViews, and here views: that object."
            )
        self.teacher: nn.Module | None = None
        self.student: nn.Module | None = None
        self._forget()

    def _forget(self) -> None:
        self.paired: PairedBlocks | None = None
        self._cached: CachedTeacher | None = None
        self._batch: tuple[Tensor, Mapping[int, Tensor]] | None = None

    def attach(self, **models: nn.Module) -> None:
        """`teacher=` or `student=`. Blocks and rows stay as they are where it is the model of the stage before."""
        for role, model in models.items():
            if getattr(self, role) is not model:
                self.close()
                setattr(self, role, model)

    def teacher_outputs(self, images: Tensor, keys: Mapping[str, Tensor] | None) -> list[Tensor]:
        """At every cut, and the logits."""
        if self.paired is None:
            student = self.teacher if self.student is None else self.student
            self.paired = pair_blocks(self.teacher, student, images, self.cuts, bridge=self.bridge)
        wanted = range(len(self.paired))
        known = self.paired.teacher_outputs(images, wanted) if self.settings is None else self._kept(images, keys)
        self._batch = images, known
        return [known[k] for k in wanted]

    def student_outputs(self, groups: Sequence[Sequence[int]], images: Tensor) -> list[Tensor]:
        """At every cut, and the logits; groups begin at the teacher's outputs for the same images."""
        if self._batch is None or self._batch[0] is not images:
            raise ConfigError(
                "StableKDStudent met images that StableKDTeacher has not; give both wrappers one SharedBlocks."
            )
        return self.paired.student_outputs(groups, images, self._batch[1])

    def close(self) -> None:
        """Let go of the files of rows."""
        if self._cached is not None:
            self._cached.close()
        self._forget()

    def _kept(self, images: Tensor, keys: Mapping[str, Tensor] | None) -> dict[int, Tensor]:
        if not keys or not {SAMPLE, VIEW} <= keys.keys():
            raise ConfigError(
                "The batch came without the keys sample_id and view, so its rows cannot be found; train on "
                "SampleViews, and "
                "set forward_proc: forward_batch_supp_dict for the teacher."
            )
        count, size = len(images), self.views.source.batch_size
        if count > size:
            raise ConfigError(
                f"The batch has {count} images, but SampleViews was made for batch_size={size}; make them equal."
            )
        # The teacher's last bits depend on the batch size: a short batch is filled up.
        filled = torch.arange(size) % count
        if count < size:
            images = images[filled.to(images.device)]
        batch = Batch(keys[SAMPLE].cpu()[filled], keys[VIEW].cpu()[filled], images, None)
        if self._cached is None:
            self._cached = self._open(images)
        found = self._cached.outputs(range(len(self.paired)), images, batch)
        return {k: value[:count] for k, value in found.items()}

    def _open(self, images: Tensor) -> CachedTeacher:
        source, head = self.views.source, len(self.paired.cuts)
        examples = self.paired.teacher_outputs(images)
        codecs = {k: self.settings.logits if k == head else self.settings.codecs[0] for k in examples}
        columns = Columns(self.paired, source, self.settings, images.device, source.views)
        opened = columns.open(Plan({k: Kept("disk", codec) for k, codec in codecs.items()}), examples)
        return CachedTeacher(self.paired, opened, source.split.total, images.device)
