"""A data set for torch's DataLoader whose random views have keys, by which a teacher's outputs are found again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from stablekd_fast.data import Augmentation, Split, TrainSource, open_dataset
from stablekd_fast.data.dataset import Channels
from stablekd_fast.data.records import FileRecords
from stablekd_fast.data.split import ImageFiles
from stablekd_fast.errors import ConfigError

SAMPLE, VIEW = "sample_id", "view"
"""Names of the keys."""


class SampleViews(Dataset):
    """Training images in views that have keys: items are (image, label, {`sample_id`, `view`}).

    Call `set_epoch` before each epoch: epoch e shows view e modulo `views`, by the generator of
    `stablekd_fast.data.views`.

    Args:
        dataset: a path or name that `stablekd distill --data` takes, or torchvision's CIFAR10, CIFAR100, ImageFolder
            and others that have `data` and `targets`, or `samples`, without transforms.
        views: how many views there are.
        batch_size: the loader's.
        seed: what views are drawn from.
        mean, std: per channel, of pixels between 0 and 1; the data set's own by default.
        padding: pixels by which small images are padded before they are cropped.
        flip: whether images are mirrored at random.
        size: pixels to which cuts of large images are scaled.
    """

    def __init__(
        self,
        dataset: str | Path | Dataset,
        views: int,
        batch_size: int,
        *,
        seed: int = 0,
        mean: Channels | None = None,
        std: Channels | None = None,
        padding: int = 4,
        flip: bool = True,
        size: int = 224,
    ) -> None:
        if isinstance(dataset, (str, Path)):
            opened = open_dataset(dataset)
            split, mean, std = opened.train, mean or opened.mean, std or opened.std
        else:
            split = _split_of(dataset, size)
        if mean is None or std is None:
            raise ConfigError(
                "SampleViews was given no mean and std; give three values each, of pixels between 0 and 1."
            )
        kind = (
            Augmentation("pad_crop", flip, padding) if split.resident else Augmentation("resized_crop", flip, size=size)
        )
        # DALI would begin a pipeline of its own in every worker of the DataLoader.
        choice = "resident" if split.resident else "torchvision"
        mean, std = cast(Channels, tuple(mean)), cast(Channels, tuple(std))
        self.source = TrainSource(split, kind, mean, std, batch_size=batch_size, seed=seed, views=views, source=choice)
        self._views = views
        # Shared, so that workers that outlive an epoch see the next one.
        self._epoch = torch.full((), -1, dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch; they count from 0."""
        self._epoch.fill_(epoch)

    def view_of(self, epoch: int) -> int:
        """Return the number of the view that an epoch shows."""
        return epoch % self._views

    def __len__(self) -> int:
        return len(self.source.split)

    def __getitem__(self, index: int) -> tuple[Tensor, int, dict[str, int]]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int, dict[str, int]]]:
        """Return a batch at once, as torch's DataLoader asks for it."""
        epoch = int(self._epoch)
        if epoch < 0:
            raise ConfigError(
                "No epoch was begun, so views have no number; call set_epoch before each (Blockwise does in begin, "
                "torchdistill with pre_epoch_process: begin_view)."
            )
        batch = self.source.batch(np.array(indices), self.view_of(epoch))
        assert batch.images is not None and batch.view is not None
        keys = [{SAMPLE: sample, VIEW: batch.view} for sample in batch.sample_ids.tolist()]
        return list(zip(batch.images, batch.labels.tolist(), keys))


def _split_of(dataset: Dataset, crop_size: int) -> Split:
    """Return the images of a torchvision data set.

    Raises ConfigError for other data sets, and for transforms, which would not be applied.
    """
    if getattr(dataset, "transforms", None) is not None or getattr(dataset, "transform", None) is not None:
        raise ConfigError(
            f"{type(dataset).__name__} has transforms, whose random choices have no keys; "
            "give it none, SampleViews crops, mirrors and normalises."
        )
    pixels, targets, samples = (getattr(dataset, name, None) for name in ("data", "targets", "samples"))
    is_images = isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.ndim == 4
    if is_images and targets is not None:
        return Split(torch.tensor(targets), images=torch.from_numpy(pixels))
    if samples is not None:
        paths, labels = zip(*samples)
        return Split(torch.tensor(labels), files=ImageFiles(FileRecords.of(paths), crop_size))
    raise ConfigError(
        f"{type(dataset).__name__} has neither `data` uint8 [N, H, W, 3] with `targets`, "
        "nor `samples` of (path, label); give such a data set, or a path that stablekd distill takes."
    )
