"""Batches of unchanged images, to evaluate on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from itertools import chain, islice
from pathlib import Path

import torch
from torch import Tensor

from stablekd_fast.data.augmentation import Interpolation
from stablekd_fast.data.batch import Batch, check_settings, normalised
from stablekd_fast.data.crops import BATCHES_AHEAD
from stablekd_fast.data.dataset import Channels
from stablekd_fast.data.pixels import centre_crop, decode_rgb
from stablekd_fast.data.split import Split
from stablekd_fast.data.threads import ordered_map
from stablekd_fast.errors import ConfigError

EVAL_VIEW = -1


class EvalSource:
    """Batches of unchanged images in order; the last one may be smaller.

    Large images are scaled by `interpolation` so that the short side has `resize` pixels (default: 256/224 of
    `image_size`, which is the size they are trained on by default), and the centre is cut out. Bad images that are
    skipped are missing from their batch. Each of `ranks` processes gets every `ranks`-th batch. Images are normalised
    on `device`, where they go as bytes.
    """

    def __init__(
        self,
        split: Split,
        mean: Channels,
        std: Channels,
        *,
        batch_size: int,
        image_size: int | None = None,
        resize: int | None = None,
        interpolation: Interpolation = "bilinear",
        workers: int = 0,
        rank: int = 0,
        ranks: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        check_settings(mean, std, batch_size, workers)
        if split.resident and image_size is not None:
            _check_own_size(split, image_size)
        self.split, self.mean, self.std = split, mean, std
        self._answer: Callable[[Tensor], Tensor] | None = None
        self._answered = torch.empty(0, dtype=torch.int64)
        self.batch_size, self.workers = batch_size, workers
        self.rank, self.ranks, self.device = rank, ranks, torch.device(device)
        self.image_size = image_size or split.crop_size
        self.resize = resize
        self.interpolation: Interpolation = interpolation
        if resize is not None and (self.image_size is None or resize < self.image_size):
            raise ConfigError(
                f"evaluation.resize={resize} was given, which does not go with a cut of {self.image_size} pixels: "
                "give at least the cut, and only for images that are larger than 64 pixels."
            )

    def batches(self) -> Generator[Batch]:
        """Show this rank's images once, in the order of the split."""
        return self._resident_batches() if self.split.resident else self._decoded_batches()

    @property
    def truth(self) -> str:
        """What the labels of its batches are: `labels` of the data set, or the `teacher`'s answers."""
        return "labels" if self._answer is None else "teacher"

    def labelled_by(self, answer: Callable[[Tensor], Tensor]) -> EvalSource:
        """Return the same batches with labels that `answer` gives for images `[N, 3, H, W]`, int64 `[N]`. It is asked
        once for each image."""
        other = copy.copy(self)
        other._answer, other._answered = answer, torch.full((self.split.total,), -1)
        return other

    def _labels(self, rows: Tensor, images: Tensor) -> Tensor:
        if self._answer is None:
            return self.split.labels[rows]
        samples = self.split.sample_ids[rows]
        if bool((self._answered[samples] < 0).any()):
            self._answered[samples] = self._answer(images).to(self._answered)
        return self._answered[samples]

    def _chunks(self) -> Iterator[Tensor]:
        return islice(torch.arange(len(self.split)).split(self.batch_size), self.rank, None, self.ranks)

    def _batch(self, rows: Tensor, pixels: Tensor) -> Batch:
        if self.device.type == "cuda":
            pixels = pixels.pin_memory()
        images = normalised(pixels.to(self.device, non_blocking=True), self.mean, self.std)
        return Batch(self.split.sample_ids[rows], EVAL_VIEW, images, self._labels(rows, images))

    def _resident_batches(self) -> Generator[Batch]:
        for rows in self._chunks():
            yield self._batch(rows, self.split.images[rows])

    def _decoded_batches(self) -> Generator[Batch]:
        decoded = ordered_map(
            lambda position: self.split.usable(position, self._centre),
            chain.from_iterable(chunk.tolist() for chunk in self._chunks()),
            workers=self.workers,
            ahead=BATCHES_AHEAD * self.batch_size,
        )
        with closing(decoded):
            for rows in self._chunks():
                images = list(islice(decoded, len(rows)))
                good = [image for image in images if image is not None]
                if good:
                    yield self._batch(rows[torch.tensor([image is not None for image in images])], torch.stack(good))

    def _centre(self, content: bytes, name: Path, sample_id: int) -> Tensor:
        assert self.image_size is not None  # large images have a size
        return centre_crop(decode_rgb(content, name), self.image_size, self.resize, self.interpolation)


def _check_own_size(split: Split, image_size: int) -> None:
    height, width = split.images.shape[1:3]
    if (height, width) != (image_size, image_size):
        raise ConfigError(
            f"Images held in memory are evaluated at their own size, {width} x {height} pixels, got {image_size}; "
            "give the image size to open_dataset."
        )
