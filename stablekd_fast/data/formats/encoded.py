"""Splits of encoded images: small ones are kept in memory, large ones are read batch by batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from stablekd_fast.data.pixels import BadImage, read_header
from stablekd_fast.data.records import Records
from stablekd_fast.data.split import ImageFiles, OnBadImage, Split, no_labels
from stablekd_fast.errors import DataError

SMALL_SIDE = 64
DEFAULT_CROP = 224
_LOOKED_AT = 256
"""From so many images it is told whether they are small."""


@dataclass(eq=False)
class Encoded:
    """What was found of encoded images before they become splits."""

    root: Path
    """Names the images in errors."""
    classes: list[str]
    """Empty where no image has a label."""
    parts: Mapping[str, tuple[Records, list[int] | None]]
    """Images and labels (None: without) by "train", "test" and "validation", of which the latter may be missing."""
    notes: list[str] = field(default_factory=list)
    """What was decided, in sentences."""
    left_out: dict[str, int] = field(default_factory=dict)
    """How many files and folders are not used, by reason."""


def encoded_splits(
    root: Path,
    parts: Mapping[str, tuple[Records, list[int] | None]],
    *,
    crop_size: int | None,
    on_bad_image: OnBadImage,
) -> tuple[dict[str, Split], list[str]]:
    """Return the splits of images, with labels or without (None), by part, and what was decided, in sentences.

    Images of which most have at most 64 pixels on both sides are kept in memory, at their own size or resized to
    `crop_size`, unless that is larger; others are read batch by batch at `crop_size` (default 224). `root` names the
    images in errors. Raises `DataError`.
    """
    sizes = _probe(parts["train"][0])
    small = sum(max(size) <= SMALL_SIDE for size in sizes)
    notes = []
    if 0 < small < len(sizes):
        notes.append(
            f"{small} of {len(sizes)} training images that were looked at have up to {SMALL_SIDE} pixels on both "
            f"sides, the others more; all are read as the {'small' if 2 * small > len(sizes) else 'large'} ones."
        )
    resident = 2 * small > len(sizes) and (crop_size or 0) <= SMALL_SIDE
    shape = _small_shape(root, sizes, crop_size) if resident else None

    def split(records: Records, labels: list[int] | None) -> Split:
        files = ImageFiles(
            records=records,
            crop_size=crop_size or DEFAULT_CROP,
            shape=shape,
            resizing=crop_size is not None,
            on_bad_image=on_bad_image,
        )
        return Split(no_labels(len(records)) if labels is None else torch.tensor(labels), files=files)

    return {part: split(*found) for part, found in parts.items()}, notes


def _probe(records: Records) -> list[tuple[int, int]]:
    """Return height and width of readable images, evenly spread over the split, from their headers. Bad images are
    judged when they are read to be used."""
    sizes: list[tuple[int, int]] = []
    bad: BadImage | None = None
    count = min(len(records), _LOOKED_AT)
    for number in (k * len(records) // count for k in range(count)):
        try:
            header = read_header(records.read(number), records.name(number))
        except BadImage as error:
            bad = error
        else:
            sizes.append((header.height, header.width))
    if not sizes:
        raise DataError(f"None of {count} training images that were looked at can be read. {bad}")
    return sizes


def _small_shape(root: Path, sizes: list[tuple[int, int]], crop_size: int | None) -> tuple[int, int]:
    """The shape in which small images are kept: as asked for, else that of most of them, if it is that of most."""
    if crop_size is not None:
        return crop_size, crop_size
    counted = Counter(sizes).most_common()
    if 2 * counted[0][1] <= len(sizes):
        listed = ", ".join(f"{width} x {height}" for (height, width), _ in counted[:3])
        raise DataError(f"The images of {root} differ in size ({listed}, …); give an image size to have all resized.")
    return counted[0][0]
