"""Data sets in few large files: WebDataset tars and TFRecords, read at random.

A folder holds them as `train*.tar` beside `val*.tar` (or `test*`), or as `train-00000-of-01024` beside
`validation-00000-of-00128`. Index files as DALI's `wds2idx` and `tfrecord2idx` write them (`NAME.idx` beside the
archive) are used where they are there; without them the archives are walked through once, from header to header.
"""

from __future__ import annotations

import re
import struct
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from stablekd_fast.data.pixels import IMAGE_SUFFIXES
from stablekd_fast.data.records import ArchiveRecords
from stablekd_fast.errors import DataError

_PARTS = {"train": "train", "val": "test", "validation": "test", "test": "test"}
_TFRECORD = re.compile(r"(-\d+-of-\d+|\.tfrecords?)$")
_INDEX = ".idx"
_LABEL = "cls"
"""The ending of the member that holds a sample's class, a whole number."""
_IMAGE_KEYS, _LABEL_KEYS = ("image/encoded", "encoded", "image"), ("image/class/label", "label")


@dataclass(frozen=True)
class Sample:
    """An image inside an archive and the class that it says it has: a number, or the name of a folder."""

    name: str
    offset: int
    size: int
    label: int | str


def is_archive(name: str) -> bool:
    """Whether a file is called like an archive of a data set."""
    return name.endswith(".tar") or _TFRECORD.search(name) is not None


def find_archives(folder: Path) -> dict[str, list[Path]] | None:
    """Find the archives of the training and the test part in `folder` or in its folders of these names; None if there
    are none."""
    found: dict[str, list[Path]] = {}
    for path in sorted([*folder.glob("*"), *folder.glob("*/*")]):
        if is_archive(path.name) and path.is_file():
            words = re.split(r"[^a-z]+", str(path.relative_to(folder)).lower())
            part = next((_PARTS[word] for word in words if word in _PARTS), None)
            if part is not None:
                found.setdefault(part, []).append(path)
    if not found:
        return None
    for part in ("train", "test"):
        if part not in found:
            raise DataError(
                f"{folder} holds archives but none named {part}; name them train*.tar and val*.tar (or test*)."
            )
    return found


def open_archives(archives: dict[str, list[Path]]) -> tuple[list[str], dict[str, tuple[ArchiveRecords, list[int]]]]:
    """Return class names, and records with labels of "train" and "test". Raises `DataError`."""
    samples = {part: [list(read_index(path)) for path in paths] for part, paths in archives.items()}
    labels = {part: [s.label for listed in samples[part] for s in listed] for part in samples}
    classes = _classes(labels["train"], archives["train"][0])
    unknown = sorted({str(label) for label in labels["test"]} - set(classes))
    if unknown:
        raise DataError(f"Class {unknown[0]} of {archives['test'][0].parent}'s test archives has no training images.")
    number = {name: place for place, name in enumerate(classes)}
    opened = {}
    for part, paths in archives.items():
        opened[part] = (archive_records(paths, samples[part]), [number[str(label)] for label in labels[part]])
    return classes, opened


def archive_records(archives: list[Path], samples: list[list[Sample]]) -> ArchiveRecords:
    """Return the records of archives, given the samples of each."""
    places = [(archive, s.offset, s.size) for archive, listed in enumerate(samples) for s in listed]
    names = [s.name for listed in samples for s in listed]
    return ArchiveRecords(archives, np.array(places, np.int64), names)


def read_index(path: Path) -> Iterator[Sample]:
    """List the labelled images of one archive, in its order. Raises `DataError`."""
    index = path.with_suffix(_INDEX) if path.suffix == ".tar" else path.with_name(path.name + _INDEX)
    index = index if index.is_file() else None
    try:
        if path.suffix == ".tar":
            yield from _samples_of_members(path, _indexed_members(index) if index else _members(path))
        else:
            yield from _examples(path, _indexed_records(index) if index else _records(path))
    except (OSError, ValueError, IndexError, tarfile.TarError, struct.error) as error:
        said = f" by its index {index.name}" if index else ""
        raise DataError(f"Cannot read archive {path}{said}: {error}. Fetch it again or make the index anew.") from error


def _classes(labels: list[int | str], archive: Path) -> list[str]:
    """Return the names of the classes: their numbers, which begin at 0 or 1 and leave no gaps, or the folders."""
    numbers = sorted({label for label in labels if isinstance(label, int)})
    folders = sorted({label for label in labels if isinstance(label, str)})
    if bool(numbers) == bool(folders):
        raise DataError(
            f"{archive.parent}: some images have a class number and others a folder; needed is one or the other."
        )
    if numbers and (numbers[0] < 0 or numbers[-1] > len(numbers)):
        raise DataError(f"{archive.parent}: class numbers {numbers[:10]} have gaps; number the classes without gaps.")
    return folders or [str(number) for number in numbers]


# Tar archives: members whose names are the same up to the first dot are one sample.

Member = tuple[str, int, int]
"""Name, offset and size."""


def _members(path: Path) -> Iterator[Member]:
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            if member.isfile():
                yield member.name, member.offset_data, member.size


def _indexed_members(index: Path) -> Iterator[Member]:
    """Read an index: `v1.2 COUNT`, then a line for each sample: `ENDING OFFSET SIZE NAME` of each of its members."""
    lines = index.read_text().splitlines()
    if not lines or not lines[0].startswith("v1.2"):
        raise ValueError(
            f"an index of version v1.2 is needed, its first line is {lines[0][:20] if lines else 'missing'!r}"
        )
    for line in lines[1:]:
        words = line.split()
        for start in range(0, len(words), 4):
            _, offset, size, name = words[start : start + 4]
            yield name, int(offset), int(size)


def _samples_of_members(path: Path, members: Iterator[Member]) -> Iterator[Sample]:
    images, labels = {}, {}
    with open(path, "rb") as file:
        for name, offset, size in members:
            folder, _, base = name.rpartition("/")
            stem, _, ending = base.partition(".")
            key = f"{folder}/{stem}"
            if f".{ending.rpartition('.')[2].lower()}" in IMAGE_SUFFIXES:
                images[key] = (name, offset, size)
            elif ending == _LABEL:
                file.seek(offset)
                labels[key] = int(file.read(size))
    for key, (name, offset, size) in images.items():
        folder = name.rpartition("/")[0].rpartition("/")[2]
        if key not in labels and not folder:
            raise ValueError(
                f"{name} has no class: neither a member {key.strip('/')}.{_LABEL} nor a folder that names it"
            )
        yield Sample(name, offset, size, labels.get(key, folder))


# TFRecords: length (8 bytes), checksum (4), a tf.train.Example, checksum (4).


def _records(path: Path) -> Iterator[tuple[int, int]]:
    end = path.stat().st_size
    with open(path, "rb") as file:
        at = 0
        while at < end:
            file.seek(at)
            (size,) = struct.unpack("<Q", file.read(8))
            if at + size + 16 > end:
                raise ValueError(f"a record at byte {at} would be {size} bytes long, and the file ends at {end}")
            yield at, size + 16
            at += size + 16


def _indexed_records(index: Path) -> Iterator[tuple[int, int]]:
    """Read an index: a line `OFFSET SIZE` for each record, its frame included."""
    for line in index.read_text().splitlines():
        offset, size = line.split()
        yield int(offset), int(size)


def _examples(path: Path, records: Iterator[tuple[int, int]]) -> Iterator[Sample]:
    with open(path, "rb") as file:
        for number, (offset, size) in enumerate(records):
            image, label = None, None
            for key, start, length in _features(file, offset + 12, offset + size - 4):
                if key in _IMAGE_KEYS:
                    image = _only_value(file, start, length)
                elif key in _LABEL_KEYS:
                    at, length = _only_value(file, start, length)
                    label = _varint(_read(file, at, length), 0)[0]
            if image is None or label is None:
                raise ValueError(f"record {number} holds no {_IMAGE_KEYS[0]} or no {_LABEL_KEYS[0]}")
            yield Sample(f"{number}", *image, label)


def _features(file: BinaryIO, start: int, stop: int) -> Iterator[tuple[str, int, int]]:
    """Find name, and place of the Feature message, of each entry: Example.features (1) . feature (1, a map: key 1,
    value 2)."""
    for _, at, length in _fields(file, start, stop):
        for _, entry, entry_length in _fields(file, at, at + length):
            parts = {field: (place, size) for field, place, size in _fields(file, entry, entry + entry_length)}
            place, size = parts[1]
            yield _read(file, place, size).decode(), *parts.get(2, (place, 0))


def _only_value(file: BinaryIO, start: int, length: int) -> tuple[int, int]:
    """Find the only value of a Feature: a list of bytes (1) or of numbers (3), whose values are its field 1."""
    ((_, at, length),) = _fields(file, start, start + length)
    values = list(_fields(file, at, at + length))
    return values[0][1:]


def _fields(file: BinaryIO, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Find number, and place of the content, of each field of a protobuf message, without reading the contents."""
    while start < stop:
        head = _read(file, start, min(20, stop - start))
        tag, used = _varint(head, 0)
        kind = tag & 7
        if kind == 0:
            length = _varint(head, used)[1] - used
        elif kind == 2:
            length, used = _varint(head, used)
        else:
            raise ValueError(f"a field of kind {kind} at byte {start} belongs to no tf.train.Example")
        if start + used + length > stop:
            raise ValueError(f"a field at byte {start} is longer than the message that holds it")
        yield tag >> 3, start + used, length
        start += used + length


def _read(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """Return the number at `at`, and where it ends."""
    value = shift = 0
    while True:
        byte = content[at]
        value, at, shift = value | (byte & 127) << shift, at + 1, shift + 7
        if byte < 128:
            return value, at
