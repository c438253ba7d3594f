"""Image trees: `train/CLASS/*` beside `val/CLASS/*` and `test/CLASS/*`, of which one may be missing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from stablekd_fast.data.formats.archives import is_packed
from stablekd_fast.data.formats.left_out import LeftOut
from stablekd_fast.data.pixels import IMAGE_SUFFIXES, holds_image
from stablekd_fast.data.records import FileRecords
from stablekd_fast.errors import DataError, printable

_LAYOUT = "DIR/train/CLASS/* with DIR/val/CLASS/* or DIR/test/CLASS/*"

NAMES = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
"""What the folders of the three parts are called, in capitals or not; the first first."""

_OF_SYSTEMS = frozenset(
    ("@eadir", "__macosx", "#recycle", "$recycle.bin", "lost+found", "system volume information", "__pycache__")
)
"""Folders that Macs, Windows, network storages and file systems make, in small letters."""
_NOTES = frozenset(("thumbs.db", "desktop.ini", "icon\r"))


@dataclass
class Tree:
    """A tree of images: its classes, the images of its parts, and what was seen on the way."""

    root: Path
    classes: list[str]
    parts: dict[str, tuple[FileRecords, list[int]]]
    """By "train", "test" and, where there is one of its own, "validation"."""
    left_out: LeftOut = field(default_factory=LeftOut)
    notes: list[str] = field(default_factory=list)
    """What was decided, in sentences."""


def find_tree(path: Path) -> Path | None:
    """Return the folder that holds `train`, with folders in it: `path` itself or its only such child."""
    if _holds_train(path):
        return path
    nested = [child for child in visible_folders(path) if _holds_train(child)]
    return nested[0] if len(nested) == 1 else None


def list_tree(root: Path) -> Tree:
    """List the images of a tree. Raises `DataError`."""
    train = part_folder(root, "train")
    assert train is not None, "find_tree gave a folder without train"
    classes = [child.name for child in visible_folders(train)]
    if not classes:
        raise DataError(f"{train} holds no class folders; needed is {_LAYOUT}.")
    tree = Tree(root, classes, {})
    tree.parts["train"] = _list_part(tree, train)
    for part, folder in _labelled(tree, train).items():
        tree.parts[part] = _list_part(tree, folder)
    return tree


def _holds_train(path: Path) -> bool:
    train = part_folder(path, "train")
    return train is not None and (bool(visible_folders(train)) or not any(map(is_packed, _visible(train))))


def part_folder(root: Path, part: str) -> Path | None:
    """The folder of a part by any of its names; one that is written as here comes first."""
    found = {child.name.lower(): child for child in reversed(visible_folders(root))}
    found |= {child.name: child for child in visible_folders(root)}
    return next((found[name] for name in NAMES[part] if name in found), None)


def _labelled(tree: Tree, train: Path) -> dict[str, Path]:
    """The folders of the parts to evaluate on, of those that hold classes of the training images."""
    known, found = set(tree.classes), {}
    for part in ("validation", "test"):
        folder = part_folder(tree.root, part)
        if folder is None:
            continue
        own = {child.name for child in visible_folders(folder)}
        if own - known and own & known:
            raise _differing(train, known, folder, own)
        if own & known:
            found[part] = folder
            if known - own:
                missing = sorted(known - own)
                tree.notes.append(f"{folder} has no images of {_some(missing)}: {len(missing)} classes.")
        else:
            tree.notes.append(f"{folder} is not used: it holds none of the {len(known)} class folders of {train}.")
    if not found:
        raise DataError(
            f"{tree.root} has no test images: neither {'/'.join(NAMES['validation'])} nor test holds class folders of "
            f"train ({_some(sorted(known))}); needed is {_LAYOUT}. Give {train} itself to use its images "
            "without labels."
        )
    if "test" not in found:
        if part_folder(tree.root, "test") is not None:
            tree.notes.append(f"{found['validation']} is the test split.")
        return {"test": found["validation"]}
    if "validation" in found:
        tree.notes.append(f"{found['validation']} is held out to look at while training, {found['test']} is the test.")
    return found


def _differing(train_root: Path, train: set[str], test_root: Path, test: set[str]) -> DataError:
    differing = [
        f"only {root} has {_some(sorted(names))}"
        for root, names in ((train_root, train - test), (test_root, test - train))
        if names
    ]
    return DataError(f"Training and test classes differ: {'; '.join(differing)}. Both trees need the same folders.")


def _list_part(tree: Tree, folder: Path) -> tuple[FileRecords, list[int]]:
    names: list[str] = []
    labels: list[int] = []
    loose = [name for name in _visible(folder) if not (folder / name).is_dir()]
    if loose:
        tree.left_out.add("files beside the class folders", folder / loose[0], len(loose))
    for label, name in enumerate(tree.classes):
        found = sorted(images_below(str(folder), name, tree.left_out)) if (folder / name).is_dir() else []
        if not found and folder.name.lower() in NAMES["train"]:
            raise DataError(
                f"Class folder {printable(folder / name)} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}); "
                f"add some, or remove the folder from all parts.{_said(tree.left_out)}"
            )
        if not found and (folder / name).is_dir():
            tree.notes.append(f"{printable(folder / name)} holds no images.")
        names += found
        labels += [label] * len(found)
    if not names:
        raise DataError(f"{folder} holds no images in its class folders; needed is {_LAYOUT}.{_said(tree.left_out)}")
    return FileRecords(str(folder), names), labels


def _said(left_out: LeftOut) -> str:
    sentence = left_out.sentence()
    return f" {sentence}" if sentence else ""


def images_below(root: str, name: str, left_out: LeftOut, tars: list[str] | None = None) -> Iterator[str]:
    """Names of the images in the folder `name` and below it, from `root` (which an empty name stands for); a folder is
    gone into once on each way. Names of plain tars are added to `tars` where it is given."""
    todo: list[tuple[str, frozenset[tuple[int, int]]]] = [(name, frozenset())]
    while todo:
        folder, above = todo.pop()
        place = os.stat(os.path.join(root, folder))
        if (place.st_dev, place.st_ino) in above:
            left_out.add("links to a folder above them", os.path.join(root, folder))
            continue
        above |= {(place.st_dev, place.st_ino)}
        with os.scandir(os.path.join(root, folder)) as entries:
            for entry in entries:
                inside = f"{folder}/{entry.name}" if folder else entry.name
                if _is_hidden(entry.name):
                    left_out.add("hidden files and folders", entry.path)
                elif _is_folder(entry):
                    todo.append((inside, above))
                elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES:
                    yield inside
                elif tars is not None and entry.name.lower().endswith(".tar"):
                    tars.append(inside)
                else:
                    left_out.add(_what(entry, left_out), entry.path)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _what(entry: os.DirEntry, left_out: LeftOut) -> str:
    """What a file is whose name does not end like an image's."""
    if entry.is_symlink() and not os.path.exists(entry.path):
        return "links that lead nowhere"
    if not entry.is_file():
        return "things that are no files"
    ending = os.path.splitext(entry.name)[1]
    named = f"files named *{ending.lower()}" if ending else "files without an ending"
    if left_out.may_look() and holds_image(entry.path):
        return f"{named} that hold images; name them by their format to have them used"
    return named


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _OF_SYSTEMS or name.lower() in _NOTES


def _visible(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if not _is_hidden(name))


def visible_folders(folder: Path) -> list[Path]:
    """The folders in a folder, in the order of their names, without those that systems make."""
    """The folders in a folder, in the order of their names, without those that systems make."""
    return [folder / name for name in _visible(folder) if (folder / name).is_dir()]


def _some(names: list[str]) -> str:
    return f"{', '.join(map(printable, names[:5]))}{' and more' if len(names) > 5 else ''}"
