"""Images without labels: whatever lies in a folder and below it, tars of images, and text files that list paths."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from stablekd_fast.data.formats.archives import archive_records, read_index
from stablekd_fast.data.formats.encoded import Encoded
from stablekd_fast.data.formats.folder import images_below, part_folder, visible_folders
from stablekd_fast.data.formats.left_out import LeftOut
from stablekd_fast.data.formats.several import merged
from stablekd_fast.data.pixels import IMAGE_SUFFIXES
from stablekd_fast.data.records import FileRecords, Records
from stablekd_fast.errors import DataError, printable
from stablekd_fast.files.reading import read_document

LISTS = (".txt", ".lst", ".list")
"""How files end that list the paths of images."""
_MOST_OF_A_LIST = 1 << 30


def unlabelled_folder(path: Path) -> Encoded | None:
    """Return the images in a folder and below it, those of plain tars too; None if there are none.

    A folder `train` without folders of its own in it is the training part; `test`, `testing`, `val` or the like beside
    it is then the test part. Raises `DataError` for tars that cannot be read.
    """
    train = part_folder(path, "train")
    if train is None or visible_folders(train):
        return _encoded(path, {"train": [path]})
    tests = (part_folder(path, part) for part in ("test", "validation"))
    test = next((folder for folder in tests if folder is not None), None)
    parts = {"train": [train], **({} if test is None else {"test": [test]})}
    found = _encoded(path, parts)
    if found is not None:
        beside = {folder.name for folder in visible_folders(path)} - {train.name, test.name if test else ""}
        if beside:
            found.notes.append(f"Of {printable(path)} only {_named(parts)} are read, not {', '.join(sorted(beside))}.")
    return found


def unlabelled_tars(path: Path, parts: dict[str, list[Path]]) -> Encoded:
    """Return the images of tars, by part. Raises `DataError`."""
    found = _encoded(path, parts)
    assert found is not None, "a tar without images is refused"
    return found


def unlabelled_list(path: Path) -> Encoded:
    """Return the images that a text file lists: a line is the path of an image, of a folder or of a tar, from the
    file's own folder where it is relative; empty lines and those that begin with # say nothing.

    Raises `DataError` for a file that is no UTF-8 text or names no image.
    """
    try:
        lines = read_document(path, _MOST_OF_A_LIST).decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"its byte {error.start} is no UTF-8"
        raise DataError(
            f"Cannot read {path} as a list of images: {reason}. Write a path a line, as UTF-8 text."
        ) from error
    left_out = LeftOut()
    named = [Path(os.path.join(path.parent, line)) for line in map(str.strip, lines) if line and line[0] not in "#\0"]
    if any("\0" in str(name) for name in named):
        raise DataError(f"{path} holds a NUL character, which no path can; write it anew, a path a line.")
    found = _encoded(path, {"train": named}, left_out)
    if found is None:
        said = left_out.sentence()
        raise DataError(
            f"{path} names no images; write into each of its lines the path of an image, of a folder or of a tar."
            f"{f' {said}' if said else ''}"
        )
    return found


def _encoded(path: Path, parts: dict[str, list[Path]], left_out: LeftOut | None = None) -> Encoded | None:
    left_out, counted, notes = LeftOut() if left_out is None else left_out, Counter(), []
    opened: dict[str, tuple[Records, list[int] | None]] = {}
    for part, places in parts.items():
        records, twice = merged(list(_records_of(places, left_out, counted)))
        if twice:
            notes.append(f"{twice:,} images of {printable(path)} are named twice; each is used once.")
        if len(records):
            opened[part] = records, None
    if "train" not in opened:
        return None
    listed = ", ".join(f"{count:,} {reason}" for reason, count in sorted((+counted).items()))
    notes += [f"Not used of the archives: {listed}."] if listed else []
    notes += filter(None, [left_out.sentence()])
    return Encoded(path, [], opened, notes, {**left_out.counts(), **+counted})


def _records_of(places: list[Path], left_out: LeftOut, counted: Counter[str]) -> Iterator[Records]:
    """Images among these paths, then what lies in folders and tars among them."""
    images = [place for place in places if place.suffix.lower() in IMAGE_SUFFIXES and not place.is_dir()]
    if images:
        yield FileRecords.of(images)
    for place in places:
        if place.suffix.lower() in IMAGE_SUFFIXES and not place.is_dir():
            continue
        tars: list[Path] = [place] if place.suffix.lower() == ".tar" and place.is_file() else []
        if place.is_dir():
            inside: list[str] = []
            names = sorted(images_below(str(place), "", left_out, inside))
            tars = [place / name for name in sorted(inside)]
            if names:
                yield FileRecords(str(place), names)
        elif not tars:
            left_out.add("lines that name no image, folder or tar", place)
        if tars:
            yield archive_records(tars, [read_index(tar, counted, labelled=False) for tar in tars], counted)


def _named(parts: dict[str, list[Path]]) -> str:
    return " and ".join(place.name for places in parts.values() for place in places)
