"""Batches of training images. Which images a step shows, and in which view, are pure functions of the seed and the
step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from itertools import tee

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stablekd_fast.data.augment import draw_partners, jittered, mixed
from stablekd_fast.data.augmentation import Augmentation
from stablekd_fast.data.batch import Batch, check_settings, normalised
from stablekd_fast.data.crops import BATCHES_AHEAD, Crops, Decoder, Job, StoredImages
from stablekd_fast.data.dataset import Channels
from stablekd_fast.data.decoders import make_decoder, pick_source
from stablekd_fast.data.operations import erased, operated
from stablekd_fast.data.resident import ResidentImages
from stablekd_fast.data.split import Split
from stablekd_fast.data.views import epoch_order, view_flips
from stablekd_fast.errors import ConfigError, DataError

Needed = Callable[[Tensor, int], bool]
"""Says whether the images of these samples, int64 `[N]`, are needed in this view."""

_Marked = tuple[np.ndarray, int, bool]
"""A job, and whether its images are needed."""

_Partners = tuple[np.ndarray, Tensor]
"""Positions int64 `[N]` of the images that are mixed into a batch, and their views uint8 `[N, H, W, 3]`."""


class TrainSource:
    """Batches of augmented training images; the last partial batch of an epoch is dropped.

    Epoch `e` shows view `e mod views` of every image, or view `e` when `views` is None. `view_seed` (default: `seed`)
    names the views, so that runs of other seeds can meet the same images. Small images are kept in the memory of
    `device`, and cropped and normalised there. Large ones are decoded by the source that `source` names (see
    `pick_source`) with `workers` threads, `prefetch` batches ahead, and normalised on `device`; one that is skipped as
    bad is replaced by the next good one, so that batches keep their size. Mixed labels need the number of `classes`;
    images without labels are mixed without.

    Each of `ranks` processes with the same settings gets its own, equal part of every batch of `batch_size` images.
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
        view_seed: int | None = None,
        source: str = "auto",
        workers: int = 0,
        prefetch: int = BATCHES_AHEAD,
        classes: int | None = None,
        device: torch.device | str = "cpu",
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        check_settings(mean, std, batch_size, workers)
        _check_augmentation(split, augmentation, classes)
        if prefetch < 1:
            raise ConfigError(f"At least 1 batch must be decoded ahead, got prefetch={prefetch}.")
        if views is not None and views < 1:
            raise ConfigError(f"The number of views must be at least 1, or none for endless new views; got {views}.")
        _check_rank(rank, ranks, batch_size)
        if batch_size > len(split):
            raise DataError(
                f"A batch of {batch_size} does not fit {len(split)} training images; "
                f"use a batch size of at most {len(split)} or more images."
            )
        self.split, self.augmentation, self.mean, self.std = split, augmentation, mean, std
        self.batch_size, self.seed, self.views, self.classes = batch_size, seed, views, classes
        self.view_seed = seed if view_seed is None else view_seed
        self.workers, self.prefetch = workers, prefetch
        self.device, self.rank, self.ranks = torch.device(device), rank, ranks
        self.choice = pick_source(source, split, self.device, scaled=augmentation.scaled_decode)
        self._resident: ResidentImages | None = None
        self._crops: Crops | None = None
        if split.resident:
            self._resident = ResidentImages(split, augmentation, self.view_seed, self.device)
        else:
            assert augmentation.size is not None  # every resized crop has one
            self._crops = Crops(split, augmentation, self.view_seed)
        self.decoder = self._make_decoder()
        self._order = (-1, np.empty(0, dtype=np.int64))
        """The epoch last asked for and its order, in one place: threads may ask for different epochs."""

    def part(self, rank: int, ranks: int) -> TrainSource:
        """Return the same source for one of `ranks` processes, with the same images in memory and the same stored
        views."""
        if (rank, ranks) == (self.rank, self.ranks):
            return self
        _check_rank(rank, ranks, self.batch_size)
        other = copy.copy(self)
        other.rank, other.ranks = rank, ranks
        other.decoder = other._make_decoder()
        return other

    def _make_decoder(self) -> Decoder | None:
        if self._crops is None:
            return None
        decoded = self.batch_size // self.ranks * (2 if self.augmentation.mix else 1)
        return make_decoder(self.choice, self._crops, decoded, self.workers, self.prefetch, self.device)

    def prepare_second(self) -> None:
        """Decode apart from the source of which this is a copy, and store nothing."""
        if self._crops is not None:
            self._crops = Crops(self.split, self._crops.augmentation, self.view_seed)
            self.decoder = self._make_decoder()

    def store_images(self, stored: StoredImages) -> None:
        """Keep decoded views by sample and view in `stored`, and take from there what it has. Only large images are
        decoded."""
        assert self._crops is not None, "small images are kept in memory as they are"
        self._crops.stored = stored

    def refresh_stored(self) -> None:
        """Take up what other processes have stored since; does nothing where nothing is stored."""
        if self._crops is not None and self._crops.stored is not None:
            self._crops.stored.refresh()

    def close(self) -> None:
        """Let go of the files of stored images, and of the logs of digests."""
        self.split.close()
        if self._crops is not None and self._crops.stored is not None:
            self._crops.stored.close()

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in one epoch."""
        return len(self.split) // self.batch_size

    def batches(
        self, start_step: int, stop_step: int, dtype: torch.dtype = torch.float32, needed: Needed | None = None
    ) -> Generator[Batch]:
        """Make the batches of steps start..stop-1, counted from the beginning of training; images in `dtype`, rounded
        once.

        Step `s` gives the same batch wherever `start_step` lies. Where `needed` says no, a batch comes without its
        images, unless its labels depend on them: where images are mixed, or others stand in for bad ones. Raises
        `DataError` at a bad image unless such images are skipped.
        """
        jobs = ((self.positions(step), self._view(step)) for step in range(start_step, stop_step))
        return self.made(jobs, dtype, None if self.augmentation.mix or self.split.replaces_bad else needed)

    def batch(self, positions: np.ndarray, view: int) -> Batch:
        """Return one view of the images at `positions` of the split, int64 `[N]`, in that order."""
        return next(self.made(iter([(positions, view)])))

    def whole_view(self, view: int) -> Generator[Batch]:
        """Show every image in one view, in the order of the split. The last batch is filled up with images from the
        start."""
        full = -(-len(self.split) // self.batch_size)
        positions = np.resize(np.arange(len(self.split)), (full, self.batch_size))
        return self.made((self._own(chunk), view) for chunk in positions)

    def positions(self, step: int) -> np.ndarray:
        """Return which images make the batch of a step: positions in the split, int64 `[N]`."""
        epoch, index = divmod(step, self.steps_per_epoch)
        known, order = self._order
        if epoch != known:
            order = epoch_order(self.seed, epoch, len(self.split))
            self._order = epoch, order
        return self._own(order[index * self.batch_size : (index + 1) * self.batch_size])

    def _view(self, step: int) -> int:
        epoch = step // self.steps_per_epoch
        return epoch if self.views is None else epoch % self.views

    def _own(self, batch: np.ndarray) -> np.ndarray:
        """Return this rank's part of a batch."""
        size = self.batch_size // self.ranks
        return batch[self.rank * size : (self.rank + 1) * size]

    def _ids(self, positions: np.ndarray) -> np.ndarray:
        return self.split.sample_ids.numpy()[positions]

    def made(
        self, jobs: Iterator[Job], dtype: torch.dtype = torch.float32, needed: Needed | None = None
    ) -> Generator[Batch]:
        """Make a batch of each job, positions in the split int64 `[N]` and a view; see `batches`."""
        make = self._resident_batches if self.split.resident else self._decoded_batches
        marked = ((*job, needed is None or needed(torch.from_numpy(self._ids(job[0])), job[1])) for job in jobs)
        return make(marked, dtype)

    def _resident_batches(self, jobs: Iterator[_Marked], dtype: torch.dtype) -> Generator[Batch]:
        for positions, view, needed in jobs:
            yield self._resident_batch(positions, view, dtype) if needed else self._batch(positions, view, None)

    def _resident_batch(self, positions: np.ndarray, view: int, dtype: torch.dtype) -> Batch:
        assert self._resident is not None
        if not self._alters:
            images = self._resident.normalised(positions, view, self.mean, self.std, dtype)
            return self._batch(positions, view, images)
        images, partners = self._resident.pixels(positions, view), None
        if self.augmentation.mix:
            others = self._partners(positions, view)
            partners = others, self._resident.pixels(others, view)
        return self._altered_batch(positions, view, images, partners, dtype)

    def _decoded_batches(self, jobs: Iterator[_Marked], dtype: torch.dtype) -> Generator[Batch]:
        """Decode what is needed. A batch whose images are not needed goes through the decoder too, empty, so that the
        decoder looks no further ahead than it does for others."""
        assert self.decoder is not None
        jobs, ahead = tee(jobs)
        decoding = (
            (self._with_partners(wanted, view) if needed else wanted[:0], view) for wanted, view, needed in ahead
        )
        with closing(self.decoder.decode(decoding)) as decoded:
            for (wanted, view, needed), (positions, images) in zip(jobs, decoded):
                if needed:
                    images = images.to(self.device, non_blocking=True)
                    yield self._decoded_batch(wanted, positions, images, view, dtype)
                else:
                    yield self._batch(wanted, view, None)

    def _decoded_batch(
        self, wanted: np.ndarray, positions: np.ndarray, images: Tensor, view: int, dtype: torch.dtype
    ) -> Batch:
        """Make a batch of what was decoded for `wanted`: crops uint8 `[N, S, S, 3]`, and behind them their partners'
        where images are mixed. `positions` are those that were read in the end."""
        assert self._crops is not None
        count, own, partners = len(wanted), positions[: len(wanted)], None
        if not self._alters:
            return self._batch(own, view, normalised(images, self.mean, self.std, self._flips(own, view), dtype))
        if self.augmentation.mix:
            others, other_images = positions[count:], images[count:]
            for place in np.flatnonzero(own != wanted):  # an image that stands in for a bad one has its own partner
                partner = int(self._partners(own[place : place + 1], view)[0])
                others[place], other = self._crops.next_good(partner, view)
                other_images[place] = other.to(self.device)
            partners = others, self._mirrored(other_images, others, view)
        return self._altered_batch(own, view, self._mirrored(images[:count], own, view), partners, dtype)

    @property
    def _alters(self) -> bool:
        return self.augmentation.alters

    def _partners(self, positions: np.ndarray, view: int) -> np.ndarray:
        return draw_partners(self.view_seed, self._ids(positions), view, len(self.split))

    def _with_partners(self, positions: np.ndarray, view: int) -> np.ndarray:
        """Return the positions to decode: those of a batch, and behind them those of their partners."""
        if not self.augmentation.mix:
            return positions
        return np.concatenate([positions, self._partners(positions, view)])

    def _flips(self, positions: np.ndarray, view: int) -> Tensor:
        """Return whether each image is mirrored, bool `[N]`."""
        flips = view_flips(self.view_seed, self._ids(positions), view) & self.augmentation.flip
        return torch.from_numpy(flips).to(self.device, non_blocking=True)

    def _mirrored(self, images: Tensor, positions: np.ndarray, view: int) -> Tensor:
        """Mirror crops `[N, H, W, 3]` where their view has them so."""
        return torch.where(self._flips(positions, view)[:, None, None, None], images.flip(2), images)

    def _altered_batch(
        self, positions: np.ndarray, view: int, images: Tensor, partners: _Partners | None, dtype: torch.dtype
    ) -> Batch:
        """Change views uint8 `[N, H, W, 3]`, mix them with those of their partners, and erase parts of them."""
        images, labels, ids = self._changed(images, positions, view), None, self._ids(positions)
        if partners is not None:
            others, other_images = partners[0], self._changed(partners[1], partners[0], view)
            images, weights = mixed(images, other_images, self.augmentation, self.view_seed, ids, view)
            if self.split.labelled:
                labels = self._mixed_labels(positions, others, torch.from_numpy(weights).float()[:, None])
        if self.augmentation.erasing:
            images = erased(images, self.augmentation, 255 * torch.tensor(self.mean), self.view_seed, ids, view)
        return self._batch(positions, view, normalised(images, self.mean, self.std, dtype=dtype), labels)

    def _changed(self, images: Tensor, positions: np.ndarray, view: int) -> Tensor:
        """Change each view by itself: its colours, then what RandAugment does."""
        augmentation, ids = self.augmentation, self._ids(positions)
        if augmentation.jitter:
            images = jittered(images, self.view_seed, ids, view, augmentation.jitter)
        if augmentation.operations:
            images = operated(images, augmentation, self.view_seed, ids, view, self.workers)
        return images

    def _mixed_labels(self, positions: np.ndarray, partners: np.ndarray, weights: Tensor) -> Tensor:
        assert self.classes is not None
        own, other = (
            F.one_hot(self.split.labels[torch.from_numpy(p)], self.classes).float() for p in (positions, partners)
        )
        return weights * own + (1 - weights) * other

    def _batch(self, positions: np.ndarray, view: int, images: Tensor | None, labels: Tensor | None = None) -> Batch:
        rows = torch.from_numpy(positions)
        return Batch(self.split.sample_ids[rows], view, images, self.split.labels[rows] if labels is None else labels)


def _check_rank(rank: int, ranks: int, batch_size: int) -> None:
    if not 0 <= rank < ranks or batch_size % ranks:
        raise ConfigError(
            f"Rank {rank} of {ranks} was given with batches of {batch_size}; ranks count from 0, and the batch size "
            f"must be a multiple of {ranks}."
        )


def _check_augmentation(split: Split, augmentation: Augmentation, classes: int | None) -> None:
    needed = "pad_crop" if split.resident else "resized_crop"
    if augmentation.kind != needed:
        held = "small images held in memory" if split.resident else "large images"
        raise ConfigError(f"{held.capitalize()} are augmented by {needed!r}, got {augmentation.kind!r}.")
    if augmentation.mix and classes is None:
        raise ConfigError(
            f"Images are to be mixed by {augmentation.mix}, and labels with them; give the number of classes."
        )
