"""Sources of batches. Order and views are pure functions of the seed and the step."""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice, starmap, tee
from typing import Protocol

import numpy as np
from PIL import Image
import torch

from stablekd_fast.data.dataset import Augmentation, Channels
from stablekd_fast.data.images import centre_crop, resized_crop
from stablekd_fast.data.split import Split
from stablekd_fast.data.threads import ordered_map
from stablekd_fast.data.views import crop_offsets_and_flips, epoch_order, resized_crop_boxes, view_flips
from stablekd_fast.errors import ConfigError, DataError
from stablekd_fast.kernels import augment_batch

# Batches decoded ahead of the one in use: enough to keep the threads busy while a step runs.
_BATCHES_AHEAD = 2

EVAL_VIEW = -1

Job = tuple[np.ndarray, int]
"""Positions in the split that make a batch, and their view."""


@dataclass(frozen=True)
class Batch:
    """`sample_ids` int64 `[N]`, `view` (-1: unchanged images), `images` float32 `[N, 3, H, W]` normalised
    and channels last in memory, `labels` int64 `[N]`."""

    sample_ids: torch.Tensor
    view: int
    images: torch.Tensor
    labels: torch.Tensor


class StoredImages(Protocol):
    """Decoded views `[S, S, 3]` uint8, before they are mirrored, by sample and view. Called from several threads."""

    def get(self, sample: int, view: int) -> np.ndarray | None: ...

    def put(self, sample: int, view: int, image: np.ndarray) -> None: ...


class TrainSource:
    """Batches of augmented training images; the last partial batch of an epoch is dropped.

    Epoch `e` shows view `e mod views` of every image, or view `e` when `views` is None. `workers` threads
    decode large images ahead; resident images need none. A large image that is skipped as bad is
    replaced by the next good one, so that batches keep their size. `view_seed` (default: `seed`) names the views, so
    that runs of other seeds can meet the same images. `stored` keeps decoded large images for later epochs and runs.
    """

    def __init__(
        self,
        split: Split,
        augmentation: Augmentation,
        mean: Channels,
        std: Channels,
        *,
        batch_size: int,
        seed: int,
        views: int | None = None,
        workers: int = 0,
        view_seed: int | None = None,
        stored: StoredImages | None = None,
    ):
        _check_common(mean, std, batch_size, workers)
        _check_augmentation(split, augmentation)
        if views is not None and views < 1:
            raise ConfigError(f"The number of views must be at least 1, or none for endless new views; got {views}.")
        if batch_size > len(split):
            raise DataError(
                f"A batch of {batch_size} does not fit {len(split)} training images; "
                f"use a batch size of at most {len(split)} or more images."
            )
        self.split, self.augmentation, self.mean, self.std = split, augmentation, mean, std
        self.batch_size, self.seed, self.views, self.workers = batch_size, seed, views, workers
        self.view_seed = seed if view_seed is None else view_seed
        self.stored = stored
        self._order_epoch, self._order = -1, np.empty(0, dtype=np.int64)

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in one epoch."""
        return len(self.split) // self.batch_size

    def batches(self, start_step: int, stop_step: int) -> Iterator[Batch]:
        """Batches of steps start..stop-1, counted from the beginning of training.

        Wherever it starts, step `s` yields the same batch. Raises `DataError` at a bad image unless
        such images are skipped.
        """
        return self._batches((self._positions(step), self._view(step)) for step in range(start_step, stop_step))

    def whole_view(self, view: int) -> Iterator[Batch]:
        """Every image in one view, in the order of the split. The last batch is filled up with images from the start."""
        full = -(-len(self.split) // self.batch_size)
        positions = np.resize(np.arange(len(self.split)), (full, self.batch_size))
        return self._batches((chunk, view) for chunk in positions)

    def _batches(self, jobs: Iterator[Job]) -> Iterator[Batch]:
        return starmap(self._resident_batch, jobs) if self.split.resident else self._decoded_batches(jobs)

    def _view(self, step: int) -> int:
        epoch = step // self.steps_per_epoch
        return epoch if self.views is None else epoch % self.views

    def _positions(self, step: int) -> np.ndarray:
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch != self._order_epoch:
            self._order_epoch, self._order = epoch, epoch_order(self.seed, epoch, len(self.split))
        return self._order[index * self.batch_size : (index + 1) * self.batch_size]

    def _resident_batch(self, positions: np.ndarray, view: int) -> Batch:
        rows = torch.from_numpy(positions)
        sample_ids = self.split.sample_ids[rows]
        padding = self.augmentation.padding
        offsets, flips = crop_offsets_and_flips(
            self.view_seed, sample_ids.numpy(), view, padding, flip=self.augmentation.flip
        )
        images = augment_batch(
            self.split.images,
            rows,
            torch.from_numpy(offsets),
            torch.from_numpy(flips),
            padding=padding,
            mean=self.mean,
            std=self.std,
        )
        return Batch(sample_ids, view, images, self.split.labels[rows])

    def _decoded_batches(self, jobs: Iterator[Job]) -> Iterator[Batch]:
        jobs, ahead = tee(jobs)
        wanted = ((position, view) for positions, view in ahead for position in positions.tolist())
        decoded = ordered_map(
            lambda job: self._decode(*job),
            wanted,
            workers=self.workers,
            ahead=_BATCHES_AHEAD * self.batch_size,
        )
        with closing(decoded):
            for _, view in jobs:
                positions, images = zip(*islice(decoded, self.batch_size))
                rows = torch.tensor(positions)
                sample_ids = self.split.sample_ids[rows]
                flips = view_flips(self.view_seed, sample_ids.numpy(), view) & self.augmentation.flip
                images = _normalised(np.stack(images), flips, self.mean, self.std)
                yield Batch(sample_ids, view, images, self.split.labels[rows])

    def _decode(self, position: int, view: int) -> tuple[int, np.ndarray]:
        """The position that was read in the end, and its image uint8 `[S, S, 3]`."""
        crop = partial(self._random_crop, view)
        for candidate in range(position, position + len(self.split)):
            candidate %= len(self.split)
            image = self._stored_or_read(candidate, view, crop)
            if image is not None:
                return candidate, image
        raise DataError(f"None of {len(self.split)} training images can be read.")

    def _stored_or_read(self, position: int, view: int, crop: Callable) -> np.ndarray | None:
        if self.stored is None:
            return self.split.read(position, crop)
        sample = int(self.split.sample_ids[position])
        image = self.stored.get(sample, view)
        if image is None:
            image = self.split.read(position, crop)
            if image is not None:
                self.stored.put(sample, view, image)
        return image

    def _random_crop(self, view: int, image: Image.Image, sample_id: int) -> np.ndarray:
        (box,) = resized_crop_boxes(
            self.view_seed, np.array([sample_id]), view, np.array([image.height]), np.array([image.width])
        )
        return resized_crop(image, box, self.augmentation.size)


class EvalSource:
    """Batches of unchanged images in order; the last one may be smaller.

    Large images are scaled so that the short side is 256/224 of `image_size` (default: the size they are
    trained on), and the centre is cut out. Bad images that are skipped are missing from their batch.
    """

    def __init__(
        self,
        split: Split,
        mean: Channels,
        std: Channels,
        *,
        batch_size: int,
        image_size: int | None = None,
        workers: int = 0,
    ):
        _check_common(mean, std, batch_size, workers)
        if split.resident and image_size is not None:
            _check_own_size(split, image_size)
        self.split, self.mean, self.std = split, mean, std
        self.batch_size, self.workers = batch_size, workers
        self.image_size = image_size or split.crop_size

    def batches(self) -> Iterator[Batch]:
        """All images once, in the order of the split."""
        return self._resident_batches() if self.split.resident else self._decoded_batches()

    def _chunks(self) -> Iterator[torch.Tensor]:
        return iter(torch.arange(len(self.split)).split(self.batch_size))

    def _resident_batches(self) -> Iterator[Batch]:
        for rows in self._chunks():
            images = _normalised(self.split.images[rows].numpy(), np.zeros(len(rows), bool), self.mean, self.std)
            yield Batch(self.split.sample_ids[rows], EVAL_VIEW, images, self.split.labels[rows])

    def _decoded_batches(self) -> Iterator[Batch]:
        decoded = ordered_map(
            lambda position: self.split.read(position, self._centre),
            range(len(self.split)),
            workers=self.workers,
            ahead=_BATCHES_AHEAD * self.batch_size,
        )
        with closing(decoded):
            for rows in self._chunks():
                images = list(islice(decoded, len(rows)))
                good = [image is not None for image in images]
                if not any(good):
                    continue
                rows = rows[torch.tensor(good)]
                images = np.stack([image for image in images if image is not None])
                images = _normalised(images, np.zeros(len(rows), bool), self.mean, self.std)
                yield Batch(self.split.sample_ids[rows], EVAL_VIEW, images, self.split.labels[rows])

    def _centre(self, image: Image.Image, sample_id: int) -> np.ndarray:
        return centre_crop(image, self.image_size)


def _normalised(images: np.ndarray, flips: np.ndarray, mean: Channels, std: Channels) -> torch.Tensor:
    """uint8 `[N, H, W, 3]` to float32 `[N, 3, H, W]`, mirrored where `flips` bool `[N]` says so."""
    count = len(images)
    return augment_batch(
        torch.from_numpy(images),
        torch.arange(count),
        torch.zeros(count, 2, dtype=torch.int64),
        torch.from_numpy(flips),
        padding=0,
        mean=mean,
        std=std,
    )


def _check_common(mean: Channels, std: Channels, batch_size: int, workers: int) -> None:
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ConfigError(f"Mean and std need three numbers each, std above 0; got {mean} and {std}.")
    if batch_size < 1:
        raise ConfigError(f"The batch size must be at least 1, got {batch_size}.")
    if workers < 0:
        raise ConfigError(f"The number of workers must be 0 or more, got {workers}.")


def _check_own_size(split: Split, image_size: int) -> None:
    height, width = split.images.shape[1:3]
    if (height, width) != (image_size, image_size):
        raise ConfigError(
            f"Images held in memory are evaluated at their own size, {width} x {height} pixels, got {image_size}; "
            "give the image size to open_dataset."
        )


def _check_augmentation(split: Split, augmentation: Augmentation) -> None:
    needed = "pad_crop" if split.resident else "resized_crop"
    if augmentation.kind != needed:
        held = "small images held in memory" if split.resident else "large images"
        raise ConfigError(f"{held.capitalize()} are augmented by {needed!r}, got {augmentation.kind!r}.")
