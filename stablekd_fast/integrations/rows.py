"""A teacher's outputs from rows by sample and view, in a loop that is not the engine's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from stablekd_fast.blocks import PairedBlocks
from stablekd_fast.cache.columns import Columns, Kept, Plan
from stablekd_fast.cache.settings import CacheSettings
from stablekd_fast.data import Batch
from stablekd_fast.errors import ConfigError
from stablekd_fast.execution.precision import Precision
from stablekd_fast.integrations.views import SAMPLE, VIEW, SampleViews
from stablekd_fast.teacher.cached import CachedTeacher

_BY_AUTOCAST = {torch.bfloat16: Precision("bf16"), torch.float16: Precision("fp16")}


class TeacherRows:
    """Serves a teacher's outputs from rows in a folder where they are stored, and stores them where not.

    Args:
        views: the training data, whose views have keys.
        directory: the folder; runs in which all is the same use it again.
        codec, logits: how exactly rows are kept, see `CacheSettings`.
        budget: most bytes in the folder, e.g. 200GB.
    """

    def __init__(
        self, views: SampleViews, directory: str, codec: str = "fp32", logits: str = "fp32", budget: str | None = None
    ) -> None:
        self.views = views
        self.settings = CacheSettings("all", directory, budget, codecs=[codec], logits=logits)
        self._cached: CachedTeacher | None = None

    def outputs(self, paired: PairedBlocks, images: Tensor, keys: Mapping[str, Tensor] | None) -> dict[int, Tensor]:
        """Return the teacher's outputs at all cuts, and its logits, by number.

        Args:
            paired: the blocks; always the same ones until `close`. They compute as the autocast around the first call
                says.
            images: `[N, 3, H, W]`, with N at most the batch size of the views.
            keys: `sample_id` and `view`, int64 `[N]`.

        Raises ConfigError for batches without keys or too large.
        """
        if not keys or not {SAMPLE, VIEW} <= keys.keys():
            raise ConfigError(
                "The batch came without the keys sample_id and view, so its rows cannot be found; train on "
                "SampleViews, and hand on the keys of each batch (torchdistill: forward_proc: forward_batch_supp_dict "
                "for the teacher)."
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
        # Rows are found by one view for the batch or, as here, by one for each; nobody reads the labels.
        views = cast(int, keys[VIEW].cpu()[filled])
        batch = Batch(keys[SAMPLE].cpu()[filled], views, images, torch.empty(0))
        if self._cached is None:
            self._cached = self._open(paired, images)
        found = self._cached.outputs(range(len(paired)), images, batch)
        return {k: value[:count] for k, value in found.items()}

    def refresh(self) -> None:
        """Take up what other processes have stored in the folder since."""
        if self._cached is not None:
            self._cached.fill(self._cached.columns.keys())

    def close(self) -> None:
        """Finish the files and let go of them; the next batch opens them again."""
        if self._cached is not None:
            try:
                self._cached.seal()
            finally:
                self._cached.close()
                self._cached = None

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy begins with: it opens the files by itself."""
        return {**self.__dict__, "_cached": None}

    def _open(self, paired: PairedBlocks, images: Tensor) -> CachedTeacher:
        source, device = self.views.source, images.device
        assert source.views is not None
        if torch.is_autocast_enabled(device.type):
            paired.precision = _BY_AUTOCAST.get(torch.get_autocast_dtype(device.type), paired.precision)
        head, examples = len(paired.cuts), paired.teacher_outputs(images)
        codecs = {k: self.settings.logits if k == head else self.settings.codecs[0] for k in examples}
        columns = Columns(paired, source, self.settings, device, source.views)
        opened = columns.open(Plan({k: Kept("disk", codec) for k, codec in codecs.items()}), examples)
        return CachedTeacher(paired, opened, source.split.total, device)
