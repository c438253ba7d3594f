"""Random crops of large images: which bytes and which box make a view, and decoding them in threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice, tee
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from stablekd_fast.data.images import BadImage, Header, decode_rgb, decode_scaled, read_header, resized_crop
from stablekd_fast.data.split import Split
from stablekd_fast.data.threads import ordered_map
from stablekd_fast.data.views import resized_crop_boxes
from stablekd_fast.errors import DataError

BATCHES_AHEAD = 2
"""Batches in work beside the one in use, unless asked for otherwise: enough to keep the threads busy while a step
runs."""

_IMAGES_PER_TASK = 16
"""Shares the cost of handing a task to a thread and of drawing its boxes."""

Job = tuple[np.ndarray, int]
"""Positions in the split that make a batch, and their view."""


class StoredImages(Protocol):
    """Decoded views `[S, S, 3]` uint8, before they are mirrored, by sample and view. Called from several threads."""

    def get(self, sample: int, view: int) -> Tensor | None: ...

    def put(self, sample: int, view: int, image: Tensor) -> None: ...


class Decoder(Protocol):
    """Makes the crops of batches."""

    def decode(self, jobs: Iterator[Job]) -> Iterator[tuple[np.ndarray, Tensor]]:
        """For each job the positions that were read in the end, and their crops uint8 `[N, S, S, 3]`."""

    def identity(self) -> dict:
        """What decides the pixels, beside the versions of Pillow, torchvision and torch."""


@dataclass(frozen=True)
class Encoded:
    """An image as its bytes, and the box (top, left, height, width) of the view that is wanted of it."""

    position: int
    content: bytes
    name: Path
    header: Header
    box: np.ndarray


class Crops:
    """The random crops of a split of large images: each sample's box in a view, scaled to `size` x `size`.

    With `scaled`, JPEGs are decoded at a half, a quarter or an eighth of their size where the box allows.
    """

    def __init__(self, split: Split, size: int, view_seed: int, scaled: bool = False) -> None:
        self.split, self.size, self.view_seed, self.scaled = split, size, view_seed, scaled
        self.stored: StoredImages | None = None

    def encoded(self, positions: list[int], view: int) -> list[Encoded | None]:
        """Bytes and boxes of images; None for bad ones that are skipped."""

        def with_header(content: bytes, name: Path, sample: int) -> tuple[bytes, Path, int, Header]:
            return content, name, sample, read_header(content, name)

        read = [self.split.usable(position, with_header) for position in positions]
        good = [place for place, image in enumerate(read) if image is not None]
        facts = [(sample, header.height, header.width) for _, _, sample, header in (read[place] for place in good)]
        samples, heights, widths = np.array(facts, np.int64).reshape(-1, 3).T
        boxes = resized_crop_boxes(self.view_seed, samples, view, heights, widths)
        images: list[Encoded | None] = [None] * len(positions)
        for place, box in zip(good, boxes):
            content, name, _, header = read[place]
            images[place] = Encoded(positions[place], content, name, header, box)
        return images

    def crop(self, image: Encoded) -> Tensor | None:
        """Decode and cut; None if the image is bad and skipped."""
        try:
            if self.scaled and image.header.plain:
                return resized_crop(
                    *decode_scaled(image.content, image.name, image.header, image.box, self.size), self.size
                )
            return resized_crop(decode_rgb(image.content, image.name, image.header), image.box, self.size)
        except BadImage as error:
            self.split.skip_or_raise(error)
            return None

    def next_good(self, position: int, view: int) -> tuple[int, Tensor]:
        """The first usable image from `position` on, and its crop. Raises DataError if there is none."""
        for candidate in range(position, position + len(self.split)):
            (image,) = self.encoded([candidate % len(self.split)], view)
            crop = self.crop(image) if image is not None else None
            if crop is not None:
                return candidate % len(self.split), crop
        raise DataError(f"None of {len(self.split)} training images can be read.")

    def kept(self, position: int, view: int) -> Tensor | None:
        """The crop, if it was stored."""
        return self.stored.get(int(self.split.sample_ids[position]), view) if self.stored is not None else None

    def keep(self, position: int, view: int, crop: Tensor) -> None:
        if self.stored is not None:
            self.stored.put(int(self.split.sample_ids[position]), view, crop)


@dataclass
class _Task:
    """Neighbours in a batch, and where their crops go."""

    positions: list[int]
    view: int
    images: Tensor
    """Of the whole batch."""
    start: int


def _starts(count: int) -> range:
    """Where the tasks of a batch begin; an empty batch has one too, which brings its empty images."""
    return range(0, max(count, 1), _IMAGES_PER_TASK)


class ThreadDecoder:
    """Decodes in `workers` threads (0: in the caller's), `depth` batches ahead: decoders and torch let go of the
    interpreter meanwhile."""

    def __init__(
        self, crops: Crops, *, batch_size: int, workers: int, pinned: bool = False, depth: int = BATCHES_AHEAD
    ) -> None:
        self.crops, self.workers, self.pinned = crops, workers, pinned
        self._ahead = depth * len(_starts(batch_size))

    def decode(self, jobs: Iterator[Job]) -> Iterator[tuple[np.ndarray, Tensor]]:
        jobs, ahead = tee(jobs)
        tasks = ordered_map(self._work, self._tasks(ahead), workers=self.workers, ahead=self._ahead)
        with closing(tasks):
            for positions, _ in jobs:
                done = list(islice(tasks, len(_starts(len(positions)))))
                yield np.concatenate([task.positions for task in done]).astype(positions.dtype), done[0].images

    def identity(self) -> dict:
        return {"source": "torchvision"}

    def _tasks(self, jobs: Iterator[Job]) -> Iterator[_Task]:
        for positions, view in jobs:
            size = self.crops.size
            images = torch.empty(len(positions), size, size, 3, dtype=torch.uint8, pin_memory=self.pinned)
            for start in _starts(len(positions)):
                yield _Task(positions[start : start + _IMAGES_PER_TASK].tolist(), view, images, start)

    def _work(self, task: _Task) -> _Task:
        crops, view, missing = self.crops, task.view, []
        for place, position in enumerate(task.positions):
            kept = crops.kept(position, view)
            if kept is None:
                missing.append(place)
            else:
                task.images[task.start + place] = kept
        for place, image in zip(missing, crops.encoded([task.positions[place] for place in missing], view)):
            crop = crops.crop(image) if image is not None else None
            if crop is None:
                task.positions[place], crop = crops.next_good(task.positions[place], view)
            task.images[task.start + place] = crop
            crops.keep(task.positions[place], view, crop)
        return task
