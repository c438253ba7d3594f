"""Sources of batches. Order and views are pure functions of the seed and the step."""

import copy
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, islice, tee
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from stablekd_fast.data.augment import cut_boxes, cut_mixed, draw_partners, draw_shares, jittered, mixed_up
from stablekd_fast.data.crops import BATCHES_AHEAD, Crops, Job
from stablekd_fast.data.dataset import Augmentation, Channels
from stablekd_fast.data.decoders import make_decoder, pick_loader
from stablekd_fast.data.pixels import centre_crop, decode_rgb
from stablekd_fast.data.split import Split
from stablekd_fast.data.threads import ordered_map
from stablekd_fast.data.views import crop_offsets_and_flips, epoch_order, view_flips
from stablekd_fast.errors import ConfigError, DataError
from stablekd_fast.kernels import augment_batch

EVAL_VIEW = -1

_NO_MEAN, _NO_STD = (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)
"""With these values stay between 0 and 255."""


@dataclass(frozen=True)
class Batch:
    """`sample_ids` int64 `[N]`, `view` (-1: unchanged images; None: crops that have no name), `images` `[N, 3, H, W]`
    normalised, float32 unless asked for otherwise, and channels last in memory (None where nobody needs them), `labels`
    int64 `[N]`, or probabilities float32 `[N, classes]` of mixed images."""

    sample_ids: torch.Tensor
    view: int | None
    images: torch.Tensor | None
    labels: torch.Tensor


Needed = Callable[[torch.Tensor, int], bool]
"""Whether the images of these samples, int64 `[N]`, are needed in this view."""

_Marked = tuple[np.ndarray, int, bool]
"""A job, and whether its images are needed."""


class TrainSource:
    """Batches of augmented training images; the last partial batch of an epoch is dropped.

    Epoch `e` shows view `e mod views` of every image, or view `e` when `views` is None. `view_seed` (default: `seed`)
    names the views, so that runs of other seeds can meet the same images. Images held in memory are kept on `device`,
    cut and normalised there. Large ones are decoded as `loader` says (see `pick_loader`) by `workers` threads,
    `prefetch` batches ahead, and normalised on `device`; one that is skipped as bad is replaced by the next good one,
    so that batches keep their size. Mixed labels need the number of `classes`.

    Of `ranks` processes with the same settings, each gets its own, equal part of every batch of `batch_size` images.
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
        loader: str = "auto",
        workers: int = 0,
        prefetch: int = BATCHES_AHEAD,
        classes: int | None = None,
        device: torch.device | str = "cpu",
        rank: int = 0,
        ranks: int = 1,
    ):
        _check_common(mean, std, batch_size, workers)
        _check_augmentation(split, augmentation)
        if prefetch < 1:
            raise ConfigError(f"At least 1 batch must be decoded ahead, got prefetch={prefetch}.")
        if views is not None and views < 1:
            raise ConfigError(f"The number of views must be at least 1, or none for endless new views; got {views}.")
        _check_rank(rank, ranks, batch_size)
        if augmentation.mix and classes is None:
            raise ConfigError(
                f"Images are to be mixed by {augmentation.mix}, and labels with them; give the number of classes."
            )
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
        self.loader = pick_loader(loader, split, self.device, scaled=augmentation.scaled_decode)
        self.crops = (
            None if split.resident else Crops(split, augmentation.size, self.view_seed, augmentation.scaled_decode)
        )
        self.decoder = self._make_decoder()
        self._resident: torch.Tensor | None = None
        self._order_epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def part(self, rank: int, ranks: int) -> "TrainSource":
        """The same source for one of `ranks` processes."""
        if (rank, ranks) == (self.rank, self.ranks):
            return self
        _check_rank(rank, ranks, self.batch_size)
        self._keep_resident()
        other = copy.copy(self)
        other.rank, other.ranks = rank, ranks
        other.decoder = other._make_decoder()
        return other

    def _make_decoder(self):
        decoded = self.batch_size // self.ranks * (2 if self.augmentation.mix else 1)
        return make_decoder(self.loader, self.crops, decoded, self.workers, self.prefetch, self.device)

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in one epoch."""
        return len(self.split) // self.batch_size

    def batches(
        self, start_step: int, stop_step: int, dtype: torch.dtype = torch.float32, needed: Needed | None = None
    ) -> Iterator[Batch]:
        """Batches of steps start..stop-1, counted from the beginning of training; images in `dtype`, rounded once.

        Wherever it starts, step `s` yields the same batch. Where `needed` says no, its images are not made, unless
        labels depend
        on that: where images are mixed, or others stand in for bad ones. Raises `DataError` at a bad image unless such
        images are skipped.
        """
        jobs = ((self.positions(step), self._view(step)) for step in range(start_step, stop_step))
        return self._batches(jobs, dtype, None if self.augmentation.mix or self.split.replaces_bad else needed)

    def batch(self, positions: np.ndarray, view: int) -> Batch:
        """One view of the images at `positions` of the split, int64 `[N]`, in that order."""
        return next(self._batches(iter([(positions, view)])))

    def whole_view(self, view: int) -> Iterator[Batch]:
        """Every image in one view, in the order of the split. The last batch is filled up with images from the
        start."""
        full = -(-len(self.split) // self.batch_size)
        positions = np.resize(np.arange(len(self.split)), (full, self.batch_size))
        return self._batches((self._own(chunk), view) for chunk in positions)

    def _batches(
        self, jobs: Iterator[Job], dtype: torch.dtype = torch.float32, needed: Needed | None = None
    ) -> Iterator[Batch]:
        make = self._resident_batches if self.split.resident else self._decoded_batches
        marked = ((*job, needed is None or needed(torch.from_numpy(self._ids(job[0])), job[1])) for job in jobs)
        return make(marked, dtype)

    def _view(self, step: int) -> int:
        epoch = step // self.steps_per_epoch
        return epoch if self.views is None else epoch % self.views

    def positions(self, step: int) -> np.ndarray:
        """Which images make the batch of a step: positions in the split, int64 `[N]`."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch != self._order_epoch:
            self._order_epoch, self._order = epoch, epoch_order(self.seed, epoch, len(self.split))
        return self._own(self._order[index * self.batch_size : (index + 1) * self.batch_size])

    def _own(self, batch: np.ndarray) -> np.ndarray:
        """This rank's part."""
        share = self.batch_size // self.ranks
        return batch[self.rank * share : (self.rank + 1) * share]

    def _keep_resident(self) -> None:
        if self.split.resident and self._resident is None:
            self._resident = self.split.images.to(self.device)

    def _resident_batches(self, jobs: Iterator[_Marked], dtype: torch.dtype) -> Iterator[Batch]:
        self._keep_resident()
        for positions, view, needed in jobs:
            yield self._resident_batch(positions, view, dtype) if needed else self._batch(positions, view, None)

    def _resident_batch(self, positions: np.ndarray, view: int, dtype: torch.dtype) -> Batch:
        if not self._alters:
            return self._batch(positions, view, self._cropped(positions, view, self.mean, self.std, dtype))
        images = self._as_uint8(self._cropped(positions, view))
        partners = self._partners(positions, view)
        others = None if partners is None else self._as_uint8(self._cropped(partners, view))
        return self._altered_batch(positions, view, images, partners, others, dtype)

    def _decoded_batches(self, jobs: Iterator[_Marked], dtype: torch.dtype) -> Iterator[Batch]:
        """A batch whose images are not needed goes through the decoder too, empty: it looks no further ahead than for
        others."""
        jobs, ahead = tee(jobs)
        decoding = (
            (self._with_partners(wanted, view) if needed else wanted[:0], view) for wanted, view, needed in ahead
        )
        with closing(self.decoder.decode(decoding)) as decoded:
            for (wanted, view, needed), (positions, images) in zip(jobs, decoded):
                if not needed:
                    yield self._batch(wanted, view, None)
                    continue
                own, count = positions[: len(wanted)], len(wanted)
                images = images.to(self.device, non_blocking=True)
                if not self._alters:
                    yield self._batch(own, view, normalised(images, self.mean, self.std, self._flips(own, view), dtype))
                    continue
                partners = others = None
                if self.augmentation.mix:
                    partners, others = positions[count:], images[count:]
                    for place in np.flatnonzero(own != wanted):  # who stands in for a bad image has its own partner
                        partner = int(self._partners(own[place : place + 1], view)[0])
                        partners[place], other = self.crops.next_good(partner, view)
                        others[place] = other.to(self.device)
                    others = self._mirrored(others, partners, view)
                yield self._altered_batch(own, view, self._mirrored(images[:count], own, view), partners, others, dtype)

    @property
    def _alters(self) -> bool:
        return bool(self.augmentation.jitter or self.augmentation.mix)

    def _ids(self, positions: np.ndarray) -> np.ndarray:
        return self.split.sample_ids.numpy()[positions]

    def _partners(self, positions: np.ndarray, view: int) -> np.ndarray | None:
        return (
            draw_partners(self.view_seed, self._ids(positions), view, len(self.split))
            if self.augmentation.mix
            else None
        )

    def _with_partners(self, positions: np.ndarray, view: int) -> np.ndarray:
        """Positions to decode: those of a batch, and behind them those of their partners."""
        partners = self._partners(positions, view)
        return positions if partners is None else np.concatenate([positions, partners])

    def _cropped(
        self,
        positions: np.ndarray,
        view: int,
        mean: Channels = _NO_MEAN,
        std: Channels = _NO_STD,
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        """Views of images in memory; without mean and std with values of 0 to 255."""
        padding = self.augmentation.padding
        offsets, flips = crop_offsets_and_flips(
            self.view_seed, self._ids(positions), view, padding, flip=self.augmentation.flip
        )
        rows, offsets, flips = (
            torch.from_numpy(part).to(self.device, non_blocking=True) for part in (positions, offsets, flips)
        )
        return augment_batch(self._resident, rows, offsets, flips, padding=padding, mean=mean, std=std, dtype=dtype)

    def _flips(self, positions: np.ndarray, view: int) -> torch.Tensor:
        """Whether each image is mirrored, bool `[N]`."""
        flips = view_flips(self.view_seed, self._ids(positions), view) & self.augmentation.flip
        return torch.from_numpy(flips).to(self.device, non_blocking=True)

    def _mirrored(self, images: torch.Tensor, positions: np.ndarray, view: int) -> torch.Tensor:
        """Crops `[N, H, W, 3]` as their view has them."""
        return torch.where(self._flips(positions, view)[:, None, None, None], images.flip(2), images)

    def _altered_batch(
        self,
        positions: np.ndarray,
        view: int,
        images: torch.Tensor,
        partners: np.ndarray | None,
        others: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> Batch:
        """Jitter and mix views uint8 `[N, H, W, 3]`."""
        both = [(positions, images)] + ([] if partners is None else [(partners, others)])
        augmentation, seed, ids = self.augmentation, self.view_seed, self._ids(positions)
        if augmentation.jitter:
            both = [(p, jittered(crops, seed, self._ids(p), view, augmentation.jitter)) for p, crops in both]
        images, labels = both[0][1], None
        if partners is not None:
            shares = draw_shares(seed, ids, view, augmentation.mix_alpha)
            if augmentation.mix == "mixup":
                images = mixed_up(images, both[1][1], shares)
            else:
                images, shares = cut_mixed(images, both[1][1], cut_boxes(seed, ids, view, shares, *images.shape[1:3]))
            labels = self._mixed_labels(positions, partners, torch.from_numpy(shares).float()[:, None])
        return self._batch(positions, view, normalised(images, self.mean, self.std, dtype=dtype), labels)

    def _mixed_labels(self, positions: np.ndarray, partners: np.ndarray, shares: torch.Tensor) -> torch.Tensor:
        own, other = (
            F.one_hot(self.split.labels[torch.from_numpy(p)], self.classes).float() for p in (positions, partners)
        )
        return shares * own + (1 - shares) * other

    def _batch(
        self, positions: np.ndarray, view: int, images: torch.Tensor | None, labels: torch.Tensor | None = None
    ) -> Batch:
        rows = torch.from_numpy(positions)
        return Batch(self.split.sample_ids[rows], view, images, self.split.labels[rows] if labels is None else labels)

    @staticmethod
    def _as_uint8(images: torch.Tensor) -> torch.Tensor:
        """`[N, 3, H, W]` with values of 0 to 255, in channels-last memory, to `[N, H, W, 3]`."""
        return images.permute(0, 2, 3, 1).round().to(torch.uint8)


class EvalSource:
    """Batches of unchanged images in order; the last one may be smaller.

    Large images are scaled so that the short side is 256/224 of `image_size` (default: the size they are
    trained on), and the centre is cut out. Bad images that are skipped are missing from their batch. Of `ranks`
    processes each gets every `ranks`-th batch.
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
        rank: int = 0,
        ranks: int = 1,
    ):
        _check_common(mean, std, batch_size, workers)
        if split.resident and image_size is not None:
            _check_own_size(split, image_size)
        self.split, self.mean, self.std = split, mean, std
        self.batch_size, self.workers = batch_size, workers
        self.rank, self.ranks = rank, ranks
        self.image_size = image_size or split.crop_size

    def batches(self) -> Iterator[Batch]:
        """This rank's images once, in the order of the split."""
        return self._resident_batches() if self.split.resident else self._decoded_batches()

    def _chunks(self) -> Iterator[torch.Tensor]:
        return islice(torch.arange(len(self.split)).split(self.batch_size), self.rank, None, self.ranks)

    def _resident_batches(self) -> Iterator[Batch]:
        for rows in self._chunks():
            images = normalised(self.split.images[rows], self.mean, self.std)
            yield Batch(self.split.sample_ids[rows], EVAL_VIEW, images, self.split.labels[rows])

    def _decoded_batches(self) -> Iterator[Batch]:
        decoded = ordered_map(
            lambda position: self.split.usable(position, self._centre),
            chain.from_iterable(chunk.tolist() for chunk in self._chunks()),
            workers=self.workers,
            ahead=BATCHES_AHEAD * self.batch_size,
        )
        with closing(decoded):
            for rows in self._chunks():
                images = list(islice(decoded, len(rows)))
                good = [image is not None for image in images]
                if not any(good):
                    continue
                rows = rows[torch.tensor(good)]
                images = normalised(torch.stack([image for image in images if image is not None]), self.mean, self.std)
                yield Batch(self.split.sample_ids[rows], EVAL_VIEW, images, self.split.labels[rows])

    def _centre(self, content: bytes, name: Path, sample_id: int) -> torch.Tensor:
        return centre_crop(decode_rgb(content, name), self.image_size)


def _check_rank(rank: int, ranks: int, batch_size: int) -> None:
    if not 0 <= rank < ranks or batch_size % ranks:
        raise ConfigError(
            f"Rank {rank} of {ranks} was given with batches of {batch_size}; ranks count from 0, and the batch size "
            "must be "
            f"a multiple of {ranks}."
        )


def normalised(
    images: torch.Tensor,
    mean: Channels,
    std: Channels,
    flips: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """uint8 `[N, H, W, 3]` to `dtype` `[N, 3, H, W]`, mirrored where `flips` bool `[N]` says so."""
    count, device = len(images), images.device
    rows, nowhere = torch.arange(count, device=device), torch.zeros(count, 2, dtype=torch.int64, device=device)
    flips = torch.zeros(count, dtype=torch.bool, device=device) if flips is None else flips
    return augment_batch(images, rows, nowhere, flips, padding=0, mean=mean, std=std, dtype=dtype)


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
