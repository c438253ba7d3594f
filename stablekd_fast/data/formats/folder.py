"""Image trees: `train/CLASS/*` beside `test/CLASS/*` or `val/CLASS/*`."""

import os
from pathlib import Path

from stablekd_fast.data.pixels import IMAGE_SUFFIXES
from stablekd_fast.data.records import FileRecords, Records
from stablekd_fast.errors import DataError

_LAYOUT = "DIR/train/CLASS/* and DIR/test/CLASS/* (or val in place of test)"


def find_tree(path: Path) -> Path | None:
    """Return the folder that holds `train`: `path` itself or its only such child."""
    if (path / "train").is_dir():
        return path
    nested = [child for child in _visible(path) if (child / "train").is_dir()]
    return nested[0] if len(nested) == 1 else None


def list_tree(root: Path) -> tuple[list[str], dict[str, tuple[Records, list[int]]]]:
    """Return class names (sorted), and images with labels of "train" and "test". Raises `DataError`."""
    train_root, test_root = root / "train", _test_root(root)
    classes, train, train_labels = _list_images(train_root)
    test_classes, test, test_labels = _list_images(test_root)
    _require_same_classes(train_root, classes, test_root, test_classes)
    return classes, {"train": (FileRecords(train), train_labels), "test": (FileRecords(test), test_labels)}


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
    paths: list[Path] = []
    labels: list[int] = []
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
    found: list[str] = []
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


def _visible(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if not child.name.startswith("."))
