"""Batches of users, by the protocols of the sources of images: what a run asks of those it can ask of these."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from stablekd_fast.data.augmentation import Augmentation
from stablekd_fast.data.batch import Batch
from stablekd_fast.data.decoders import SourceChoice
from stablekd_fast.data.evaluation import EVAL_VIEW, EvalSource
from stablekd_fast.data.source import TrainSource
from stablekd_fast.data.split import Split
from stablekd_fast.errors import ConfigError

UNCHANGED = Augmentation("pad_crop", flip=False)
"""Users come as they are."""


class UserSource(TrainSource):
    """Batches of users to train on: `images` are their numbers int64 `[N]`, `labels` float32 `[N, items]`, 1 for the
    items of a user and 0 for others. A user has one view, whatever the epoch, so that a teacher's rows are kept once.

    Order, ranks and steps are those of `TrainSource`. Raises ConfigError for settings that change images.
    """

    def __init__(self, split: Split, augmentation: Augmentation, *arguments, **settings) -> None:
        if augmentation != UNCHANGED:
            raise ConfigError(
                "Settings that crop, mirror, mix or change images were given, but the data set has users; leave them "
                "out."
            )
        super().__init__(split, augmentation, *arguments, **{**settings, "views": 1})
        self.choice = SourceChoice("users", "the data set has users, whose input is their number")

    def _resident_batch(self, positions: np.ndarray, view: int, dtype: torch.dtype) -> Batch:
        """Numbers of users are not rounded to `dtype`."""
        return self._batch(positions, view, self.split.images[torch.from_numpy(positions)])

    def _batch(self, positions: np.ndarray, view: int, images: Tensor | None, labels: Tensor | None = None) -> Batch:
        rows = torch.from_numpy(positions)
        return Batch(self.split.sample_ids[rows], view, images, self.split.labels[rows].float())


class UserEvalSource(EvalSource):
    """Batches of users to evaluate on: `labels` int8 `[N, items]` say which items are to be found (see
    `stablekd_fast.data.users`)."""

    def _batch(self, rows: Tensor, pixels: Tensor) -> Batch:
        """`pixels` are the numbers of the users."""
        return Batch(self.split.sample_ids[rows], EVAL_VIEW, pixels.to(self.device), self.split.labels[rows])
