"""Classes of images that their archive does not name: the validation images of ILSVRC 2012 come without."""

from __future__ import annotations

import io
import re
import tarfile
import zlib
from collections.abc import Collection
from pathlib import Path

from stablekd_fast.errors import DataError
from stablekd_fast.files.reading import open_regular, read_document

_LISTS = ("val_annotations.txt", "LOC_val_solution.csv", "val.txt", "valprep.sh")
"""Lists with a line for each image, of its name and its class; what else is in a line is passed over."""
_TRUTH, _META, _KIT = "ILSVRC2012_validation_ground_truth.txt", "meta.mat", "ILSVRC2012_devkit_t12"
_LARGEST, _LARGEST_KIT = 1 << 24, 1 << 27
"""More bytes than this no list has, nor ILSVRC's kit, unpacked."""
_COMPRESSED = 15
"""The kind of a part of a MATLAB file that zlib has compressed."""
_ORIGINAL = re.compile(r"ILSVRC2012_val_0*(\d+)")
_LINE = re.compile(r"(?:mv\s+)?([^\s,]+?)(?:\.(?i:jpe?g|png))?[\s,]+([^\s,]+?)/?(?:[\s,].*)?")


def classes_beside(archive: Path, images: Collection[str]) -> dict[str, str]:
    """Return the class of each image, by its name without folder and ending, as files beside the archive or one folder
    above say; empty where there is no such file. Raises DataError where there is one that cannot be used."""
    for folder in (archive.parent, archive.parent.parent):
        for name in _LISTS:
            if (folder / name).is_file():
                return _listed(folder / name)
        if any(map(_ORIGINAL.search, images)):
            found = _ground_truth(folder)
            if found is not None:
                truth, classes = found
                return {f"ILSVRC2012_val_{k:08d}": classes[number] for k, number in enumerate(truth, 1)}
    return {}


def missing_classes(archive: Path, image: str, count: int) -> str:
    """Say in a sentence that no image of an archive has a class, and what would give it one."""
    key = image[: image.rindex(".")]
    if _ORIGINAL.search(image):
        return (
            f"None of the {count} images in {archive} has a class, as {image} has none; put {_KIT}.tar.gz, which holds "
            f"ILSVRC's ground truth, or a list {_LISTS[0]} with lines of IMAGE and CLASS beside the archive."
        )
    return (
        f"Cannot use archive {archive}: {image} has no class, neither a member {key}.cls (or .cls.txt, .json, .txt) "
        f"nor a folder that names it, nor has any other of its {count} images; write one of these into the archive."
    )


def _listed(path: Path) -> dict[str, str]:
    """Read a list of images and classes."""
    try:
        lines = read_document(path, _LARGEST).decode("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"Cannot read the classes in {path}: {error}. Fetch it again.") from error
    found = (_LINE.fullmatch(line.strip()) for line in lines)
    return {Path(line[1]).name: line[2] for line in found if line}


def _ground_truth(folder: Path) -> tuple[list[int], dict[int, str]] | None:
    """Read ILSVRC's development kit, packed or not: a number for each validation image, and the class of each number;
    None where it is not there.

    The numbers are in an order of their own, which only `meta.mat` tells.
    """
    packed, places = folder / f"{_KIT}.tar.gz", (folder, folder / "data", folder / _KIT / "data")
    unpacked = next((place for place in places if (place / _TRUTH).is_file()), None)
    if unpacked is None and not packed.is_file():
        return None
    if unpacked is not None and not (unpacked / _META).is_file():
        raise DataError(
            f"{unpacked / _TRUTH} numbers the classes in an order of its own: put {_META} of {_KIT}.tar.gz, which "
            "tells it, beside that file."
        )
    source = unpacked or packed
    try:
        if unpacked is not None:
            truth, meta = (read_document(unpacked / name, _LARGEST) for name in (_TRUTH, _META))
        else:
            truth, meta = _from_kit(packed)
        numbers, classes = [int(line) for line in truth.split()], _classes_by_number(meta)
        unknown = sorted(set(numbers) - set(classes))
        if unknown:
            raise ValueError(f"it names no class of number {unknown[0]}")
    except Exception as error:  # readers of foreign formats raise what they like
        raise DataError(f"Cannot read the ground truth in {source}: {error}. Fetch it again.") from error
    return numbers, classes


def _from_kit(packed: Path) -> tuple[bytes, bytes]:
    found: dict[str, bytes] = {}
    with open_regular(packed) as file, tarfile.open(fileobj=file) as archive:
        room = _LARGEST_KIT
        for member in archive:
            room -= max(member.size, 0)
            if room < 0:
                raise ValueError(f"it holds more than {_LARGEST_KIT:,} bytes")
            name = member.name.rpartition("/")[2]
            content = archive.extractfile(member) if name in (_TRUTH, _META) else None
            if content is not None:
                found[name] = content.read()
    missing = [name for name in (_TRUTH, _META) if name not in found]
    if missing:
        raise ValueError(f"it holds no {missing[0]}")
    return found[_TRUTH], found[_META]


def _classes_by_number(meta: bytes) -> dict[int, str]:
    from scipy.io import loadmat  # scikit-learn needs it, too

    _refuse_more_than(_LARGEST_KIT, meta)
    synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
    return {int(number): str(name) for number, name in zip(synsets["ILSVRC2012_ID"], synsets["WNID"])}


def _refuse_more_than(most: int, meta: bytes) -> None:
    """Raise ValueError if the compressed parts of a MATLAB file (kind and length in 4 bytes each, then content) unpack
    to more bytes: its reader would make room for all of them."""
    order, at = "little" if meta[126:128] == b"IM" else "big", 128
    while at + 8 <= len(meta):
        kind, size = (int.from_bytes(meta[place : place + 4], order) for place in (at, at + 4))
        if kind == _COMPRESSED:
            most -= len(zlib.decompressobj().decompress(meta[at + 8 : at + 8 + size], max(most, 0) + 1))
        if most < 0:
            raise ValueError(f"{_META} unpacks to more than {_LARGEST_KIT:,} bytes")
        at += 8 + size
