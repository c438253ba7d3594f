"""Users in place of images: a split whose samples are users, and whose labels say what they had to do with each
item."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from stablekd_fast.data.split import Split
from stablekd_fast.data.views import Stream, counter_hash

SEEN, TO_BE_FOUND, UNPOPULAR = -1, 1, 2
"""What an item is to a user in a split for evaluation: known from training and left out of the ranking; one to be
found; one to be found of the least popular group. All others are 0."""


class UserSplit(Split):
    """Users, numbered as in the whole data set, with a row of all items each.

    `labels` are int8 `[users, items]`. To train on, they are 1 for the items of a user and 0 for others; to evaluate
    on, see `UNPOPULAR`. `images` are the users' numbers, int64 `[users]`, which are their sample ids too. `whole` is
    the number of users of the whole data set.
    """

    def __init__(self, labels: Tensor, users: Tensor, whole: int) -> None:
        super().__init__(labels, images=users, sample_ids=users)
        self.whole = whole

    @property
    def total(self) -> int:
        """How many users there are: sample ids lie in 0..total-1."""
        return self.whole

    @property
    def size(self) -> None:
        """Users have no size in pixels."""
        return None

    def _proportional_mask(self, count: int, stream: Stream, seed: int) -> Tensor:
        """Choose the `count` users of the lowest hash: they have no classes."""
        keys = counter_hash(stream, seed, self.sample_ids.numpy())
        mask = np.zeros(len(keys), dtype=bool)
        mask[np.argsort(keys, kind="stable")[:count]] = True
        return torch.from_numpy(mask)

    def _take(self, mask: Tensor) -> UserSplit:
        part = UserSplit(self.labels[mask], self.images[mask], self.whole)
        part._whole = self._whole
        return part
