"""What encoded images lie at a path, and with which labels: before any is decoded, and before they are a data set."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from stablekd_fast.data.formats.archives import PartMissing, find_archives, is_archive, open_archives, read_index
from stablekd_fast.data.formats.encoded import Encoded
from stablekd_fast.data.formats.folder import find_tree, list_tree, part_folder, visible_folders
from stablekd_fast.data.formats.sample import NoClass
from stablekd_fast.data.formats.unlabelled import LISTS, unlabelled_folder, unlabelled_list, unlabelled_tars


def images_in_file(path: Path) -> Encoded | None:
    """Return the images of a list of paths or of a plain tar, all without labels; None for other files."""
    if path.suffix.lower() in LISTS:
        return unlabelled_list(path)
    if path.suffix.lower() != ".tar":
        return None
    found = unlabelled_tars(path, {"train": [path]})
    if _says_classes(path):
        found.notes.append(
            f"The classes that {path} names are not used. To have them, give a folder with train*.tar and val*.tar, or "
            "with what is in them unpacked."
        )
    return found


def laid_out_images(path: Path) -> Encoded | None:
    """Return the images of a folder whose layout says which are to train on and which to test; None if it has no such
    layout. They have labels but where train holds no class folders, or no tar says of any image what it shows.

    Raises `DataError`.
    """
    root = find_tree(path)
    if root is not None and root != path and any(is_archive(name) for name in os.listdir(path)):
        root = None  # a folder wins over archives beside it, not over nearer ones
    if root is not None:
        train = part_folder(root, "train")
        flat = unlabelled_folder(root) if train is not None and not visible_folders(train) else None
        return flat or _tree(root)
    try:
        archives = find_archives(path)
    except PartMissing as error:
        if any(_says_classes(tar) for tar in error.archives):
            raise
        return None
    return None if archives is None else _archives(path, archives)


def _tree(root: Path) -> Encoded:
    tree = list_tree(root)
    beside = sorted(name for name in os.listdir(root) if is_archive(name))
    if beside:
        tree.notes.append(f"{beside[0]} is not used, as the folders beside it hold the images.")
    notes = [*tree.notes, *filter(None, [tree.left_out.sentence()])]
    return Encoded(root, tree.classes, dict(tree.parts), notes, tree.left_out.counts())


def _archives(path: Path, archives: dict[str, list[Path]]) -> Encoded:
    try:
        classes, parts = open_archives(archives)
    except NoClass as error:
        if any(_says_classes(tar) for tar in archives["train"]):
            raise
        chosen = {part: archives[part] for part in ("train", "test")}
        found = unlabelled_tars(path, chosen)
        found.notes.append(f"The images have no labels. {error}")
        return found
    left_out = sum((Counter(records.left_out) for records, _ in parts.values()), Counter())
    listed = ", ".join(f"{count:,} {reason}" for reason, count in sorted(left_out.items()))
    notes = [f"Not used of the archives: {listed}."] if listed else []
    return Encoded(path, classes, dict(parts), notes, dict(left_out))


def _says_classes(archive: Path) -> bool:
    """Whether an archive has labels; one that is no tar counts as if it had, as it is read by them alone."""
    if archive.suffix != ".tar":
        return True
    try:
        read_index(archive)
    except NoClass:
        return False
    return True
