"""Random crops of large images: which bytes and which box make a view, and decoding them in threads."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor

from stablekd_fast.data.augmentation import Augmentation
from stablekd_fast.data.pixels import BadImage, Header, decode_rgb, decode_scaled, read_header, resized_crop
from stablekd_fast.data.split import Split
from stablekd_fast.data.views import resized_crop_boxes
from stablekd_fast.errors import DataError

BATCHES_AHEAD = 2
"""How many batches are in work beside the one in use, unless asked for otherwise: enough to keep the threads busy while
a step runs."""

Job = tuple[np.ndarray, int]
"""Positions in the split that make a batch, and their view."""


class StoredImages(Protocol):
    """Decoded views uint8 `[S, S, 3]`, before they are mirrored, by sample and view. `get` and `put` are called from
    several threads."""

    def get(self, sample: int, view: int) -> Tensor | None:
        """Return the view, or None if it is not stored."""
        ...

    def put(self, sample: int, view: int, image: Tensor) -> None:
        """Store the view, where there is room for it."""
        ...

    def refresh(self) -> None:
        """Take up what other processes have stored since."""
        ...

    def close(self) -> None:
        """Let go of the files."""
        ...


class Decoder(Protocol):
    """Makes the crops of batches."""

    def decode(self, jobs: Iterator[Job]) -> Generator[tuple[np.ndarray, Tensor]]:
        """Give for each job the positions that were read in the end, and their crops uint8 `[N, S, S, 3]`."""
        ...

    def identity(self) -> dict:
        """Return what decides the pixels, beside the versions of Pillow, torchvision and torch."""
        ...


@dataclass(frozen=True)
class Encoded:
    """An image as its bytes, and the box (top, left, height, width) of the view that is wanted of it."""

    position: int
    content: bytes
    name: Path
    header: Header
    box: np.ndarray


class Crops:
    """The random crops of a split of large images: each sample's box in a view, scaled as `augmentation` says."""

    def __init__(self, split: Split, augmentation: Augmentation, view_seed: int) -> None:
        assert augmentation.size is not None  # every resized crop has one
        self.split, self.augmentation, self.view_seed = split, augmentation, view_seed
        self.size = augmentation.size
        self.stored: StoredImages | None = None

    def encoded(self, positions: list[int], view: int) -> list[Encoded | None]:
        """Read images and draw their boxes; None for bad images that are skipped."""

        def with_header(content: bytes, name: Path, sample: int) -> tuple[bytes, Path, int, Header]:
            return content, name, sample, read_header(content, name)

        read = [self.split.usable(position, with_header) for position in positions]
        good = [(place, image) for place, image in enumerate(read) if image is not None]
        facts = [(sample, header.height, header.width) for _, (_, _, sample, header) in good]
        samples, heights, widths = np.array(facts, np.int64).reshape(-1, 3).T
        box = self.augmentation
        boxes = resized_crop_boxes(self.view_seed, samples, view, heights, widths, box.scale, box.ratio)
        images: list[Encoded | None] = [None] * len(positions)
        for (place, (content, name, _, header)), box in zip(good, boxes):
            images[place] = Encoded(positions[place], content, name, header, box)
        return images

    def crop(self, image: Encoded) -> Tensor | None:
        """Decode an image and cut its box out: uint8 `[S, S, 3]`, or None if the image is bad and skipped."""
        try:
            if self.augmentation.scaled_decode and image.header.plain:
                pixels, box = decode_scaled(image.content, image.name, image.header, image.box, self.size)
            else:
                pixels, box = decode_rgb(image.content, image.name, image.header), image.box
            return resized_crop(pixels, box, self.size, self.augmentation.interpolation)
        except BadImage as error:
            self.split.skip_or_raise(error)
            return None

    def next_good(self, position: int, view: int) -> tuple[int, Tensor]:
        """Return the position of the first usable image from `position` on, and its crop. Raises DataError if there is
        none."""
        for candidate in range(position, position + len(self.split)):
            (image,) = self.encoded([candidate % len(self.split)], view)
            crop = self.crop(image) if image is not None else None
            if crop is not None:
                return candidate % len(self.split), crop
        raise DataError(f"None of {len(self.split)} training images can be read.")

    def kept(self, position: int, view: int) -> Tensor | None:
        """Return the crop if it was stored."""
        return self.stored.get(int(self.split.sample_ids[position]), view) if self.stored is not None else None

    def keep(self, position: int, view: int, crop: Tensor) -> None:
        """Store the crop, where crops are stored."""
        if self.stored is not None:
            self.stored.put(int(self.split.sample_ids[position]), view, crop)
