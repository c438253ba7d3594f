"""Splits of encoded images: small ones are kept in memory, large ones are read batch by batch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from stablekd_fast.data.pixels import BadImage, read_header
from stablekd_fast.data.records import Records
from stablekd_fast.data.split import ImageFiles, OnBadImage, Split
from stablekd_fast.errors import DataError

SMALL_SIDE = 64
DEFAULT_CROP = 224


def encoded_splits(
    root: Path, parts: Mapping[str, tuple[Records, list[int]]], *, crop_size: int | None, on_bad_image: OnBadImage
) -> tuple[Split, Split]:
    """Return the training and the test split of images with labels; `root` names them in errors. Raises `DataError`.

    Images up to 64 pixels on both sides are kept in memory, at their own size or resized to `crop_size`; larger ones
    are read batch by batch at `crop_size` (default 224).
    """
    sizes = _probe(*parts["train"], on_bad_image)
    small = all(max(size) <= SMALL_SIDE for size in sizes)
    shape = _small_shape(root, sizes, crop_size) if small else None

    def split(records: Records, labels: list[int]) -> Split:
        files = ImageFiles(
            records=records,
            crop_size=crop_size or DEFAULT_CROP,
            shape=shape,
            resizing=crop_size is not None,
            on_bad_image=on_bad_image,
        )
        return Split(torch.tensor(labels), files=files)

    return split(*parts["train"]), split(*parts["test"])


def _probe(records: Records, labels: list[int], on_bad_image: OnBadImage) -> list[tuple[int, int]]:
    """Return height and width of the first readable image of each class, from the headers."""
    sizes: dict[int, tuple[int, int]] = {}
    for number, label in enumerate(labels):
        if label in sizes:
            continue
        try:
            header = read_header(records.read(number), records.name(number))
        except BadImage:
            if on_bad_image == "stop":
                raise
        else:
            sizes[label] = (header.height, header.width)
    if not sizes:
        raise DataError(f"None of {len(labels)} training images can be read; the first is {records.name(0)}.")
    return list(sizes.values())


def _small_shape(root: Path, sizes: list[tuple[int, int]], crop_size: int | None) -> tuple[int, int]:
    if crop_size is not None:
        return crop_size, crop_size
    if len(set(sizes)) > 1:
        listed = ", ".join(f"{width} x {height}" for height, width in sorted(set(sizes))[:3])
        raise DataError(f"The images of {root} differ in size ({listed}, …); give an image size to have all resized.")
    return sizes[0]
