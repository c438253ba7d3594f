"""Random crops of large images: which bytes and which box make a view, and decoding them in threads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor

from stablekd_fast.data.pixels import BadImage, Header, decode_rgb, decode_scaled, read_header, resized_crop
from stablekd_fast.data.split import Split
from stablekd_fast.data.views import resized_crop_boxes
from stablekd_fast.errors import DataError

BATCHES_AHEAD = 2
"""Batches in work beside the one in use, unless asked for otherwise: enough to keep the threads busy while a step
runs."""


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
