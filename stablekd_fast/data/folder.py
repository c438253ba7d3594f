"""Image trees: `train/CLASS/*` beside `test/CLASS/*` or `val/CLASS/*`."""

import os
from pathlib import Path

import torch

from stablekd_fast.data.images import IMAGE_SUFFIXES, BadImage, image_size
from stablekd_fast.data.split import ImageFiles, OnBadImage, Split
from stablekd_fast.errors import DataError

SMALL_SIDE = 64
DEFAULT_CROP = 224

_LAYOUT = "DIR/train/CLASS/* and DIR/test/CLASS/* (or val in place of test)"


def find_tree(path: Path) -> Path | None:
    """The folder that holds `train`: `path` itself or its only such child."""
    if (path / "train").is_dir():
        return path
    nested = [child for child in _visible(path) if (child / "train").is_dir()]
    return nested[0] if len(nested) == 1 else None


def open_tree(
    root: Path, *, crop_size: int | None, on_bad_image: OnBadImage
) -> tuple[list[str], Split, Split]:
    """Class names (sorted) and the training and test splits of a tree. Raises `DataError`.

    Images up to 64 pixels on both sides are kept in memory, at their own size or resized to
    `crop_size`; larger ones are read batch by batch at `crop_size` (default 224).
    """
    train_root, test_root = root / "train", _test_root(root)
    classes, train_paths, train_labels = _list_images(train_root)
    test_classes, test_paths, test_labels = _list_images(test_root)
    _require_same_classes(train_root, classes, test_root, test_classes)

    sizes = _probe(train_paths, train_labels, on_bad_image)
    small = all(max(size) <= SMALL_SIDE for size in sizes)
    shape = _small_shape(root, sizes, crop_size) if small else None

    def split(paths: list[Path], labels: list[int]) -> Split:
        files = ImageFiles(
            paths=paths,
            crop_size=crop_size or DEFAULT_CROP,
            shape=shape,
            resizing=crop_size is not None,
            on_bad_image=on_bad_image,
        )
        return Split(torch.tensor(labels), files=files)

    return classes, split(train_paths, train_labels), split(test_paths, test_labels)


def _test_root(root: Path) -> Path:
    # ImageNet comes with an unlabelled `test` beside a labelled `val`: the one with classes counts.
    for name in ("test", "val"):
        folder = root / name
        if folder.is_dir() and any(child.is_dir() for child in _visible(folder)):
            return folder
    raise DataError(f"{root} has no test images: neither test nor val holds class folders; needed is {_LAYOUT}.")


def _list_images(root: Path) -> tuple[list[str], list[Path], list[int]]:
    classes = [child.name for child in _visible(root) if child.is_dir()]
    if not classes:
        raise DataError(f"{root} holds no class folders; needed is {_LAYOUT}.")
    paths, labels = [], []
    for label, name in enumerate(classes):
        found = _images_below(root / name)
        if not found:
            raise DataError(
                f"Class folder {root / name} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}); "
                "add some or remove the folder from training and test tree."
            )
        paths += found
        labels += [label] * len(found)
    return classes, paths, labels


def _images_below(folder: Path) -> list[Path]:
    found = []
    for directory, subdirectories, names in os.walk(folder, followlinks=True):
        subdirectories[:] = [name for name in subdirectories if not name.startswith(".")]
        found += [
            os.path.join(directory, name)
            for name in names
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
        ]
    return [Path(path) for path in sorted(found)]


def _require_same_classes(train_root: Path, train: list[str], test_root: Path, test: list[str]) -> None:
    if train == test:
        return
    differing = [
        f"only {root} has {', '.join(names[:5])}{' and more' if len(names) > 5 else ''}"
        for root, names in (
            (train_root, sorted(set(train) - set(test))),
            (test_root, sorted(set(test) - set(train))),
        )
        if names
    ]
    raise DataError(
        f"Training and test classes differ: {'; '.join(differing)}. Both trees need the same class folders."
    )


def _probe(paths: list[Path], labels: list[int], on_bad_image: OnBadImage) -> list[tuple[int, int]]:
    """Height and width of the first readable image of each class, from the headers."""
    sizes = {}
    for path, label in zip(paths, labels):
        if label in sizes:
            continue
        try:
            sizes[label] = image_size(path)
        except BadImage:
            if on_bad_image == "stop":
                raise
    if not sizes:
        raise DataError(f"None of {len(paths)} training images can be read; the first is {paths[0]}.")
    return list(sizes.values())


def _small_shape(root: Path, sizes: list[tuple[int, int]], crop_size: int | None) -> tuple[int, int]:
    if crop_size is not None:
        return crop_size, crop_size
    if len(set(sizes)) > 1:
        listed = ", ".join(f"{width} x {height}" for height, width in sorted(set(sizes))[:3])
        raise DataError(
            f"The images of {root} differ in size ({listed}, …); give an image size to have all resized."
        )
    return sizes[0]


def _visible(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if not child.name.startswith("."))
