"""Data sets in few large files: WebDataset tars, the tars of ILSVRC 2012 and TFRecords, read at random.

A folder holds them as `train*.tar` beside `val*.tar` (or `test*`), or as `train-00000-of-01024` beside
`validation-00000-of-00128`. Index files as DALI's `wds2idx` and `tfrecord2idx` write them (`NAME.idx` beside the
archive) are used where they are there, each place held against the archive; without them the archives are walked
through once, from header to header. What gives an image its class is said in `webdataset.py` and `tfrecords.py`.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from stablekd_fast.data.formats.sample import NoClass, Sample
from stablekd_fast.data.formats.tfrecords import tfrecord_samples
from stablekd_fast.data.formats.webdataset import PARTS, tar_images, tar_samples
from stablekd_fast.data.records import ArchiveRecords
from stablekd_fast.errors import DataError, first_line

_TFRECORD = re.compile(r"(-\d+-of-\d+|\.tfrecords?)$")
_COMPRESSED = re.compile(r"\.(tgz|tbz2?|txz|tzst|(tar|tfrecords?)\.(gz|bz2|xz|zst|lz4))$")
_SHARD = re.compile(r"(.*?)(\d+)(?:-of-(\d+))?(\D*)")
"""What is before the number of a shard, the number, how many shards there are, and the ending."""
_ILSVRC = re.compile(r"ILSVRC2012_img_(train|val)\.tar")
_ILSVRC_WITHOUT_USE = re.compile(r"ILSVRC2012_img_(train_t3|test)")
"""The dogs of a task of their own, which the others have, too, and images without classes."""
_INDEX = ".idx"


class PartMissing(DataError):
    """A folder holds archives of one part of a data set, and none of another part that is needed.

    Attributes:
        archives: those that it holds.
    """

    def __init__(self, message: str, archives: list[Path]) -> None:
        super().__init__(message)
        self.archives = archives


def is_archive(name: str) -> bool:
    """Whether a file is called like an archive of a data set."""
    return name.endswith(".tar") or _TFRECORD.search(name) is not None


def is_packed(name: str) -> bool:
    """Whether a file is called like an archive of a data set, compressed or not."""
    return is_archive(name) or _COMPRESSED.search(name) is not None


def find_archives(folder: Path) -> dict[str, list[Path]] | None:
    """Find the archives of the training and the test part in `folder` or, where there are none, in the folders in it;
    None if there are none.

    Where some are named val and others test, both are returned, for `open_archives` to choose. Beside a tree of class
    folders the tars of ILSVRC 2012 do not count, which it was unpacked from, nor do archives without a training part.
    Raises `DataError` where a part is missing.
    """
    found, compressed = defaultdict(list), defaultdict(list)
    for path in [*sorted(folder.glob("*")), *sorted(folder.glob("*/*"))]:
        wanted = found if is_archive(path.name) else compressed
        if wanted is compressed and not _COMPRESSED.search(path.name):
            continue
        words = re.split(r"[^a-z]+", str(path.relative_to(folder)).lower())
        part = next((PARTS[word] for word in words if word in PARTS), None)
        if part and path.is_file() and not path.name.startswith(".") and not _ILSVRC_WITHOUT_USE.match(path.name):
            if path.parent == folder or not wanted[part] or wanted[part][0].parent != folder:
                wanted[part].append(path)
    originals = all(_ILSVRC.fullmatch(path.name) for paths in found.values() for path in paths)
    unpacked = any(path.is_dir() for pattern in ("train/*", "*/train/*") for path in folder.glob(pattern))
    if unpacked and (originals or not found["train"]):
        return None
    for part in ("train", "test"):
        names = (part,) if part == "train" else ("test", "val")
        packed = [path for name in names for path in compressed[name]]
        if any(found[name] for name in names):
            continue
        if packed:
            raise DataError(f"{packed[0]} is compressed, and images are read in place: unpack it to a plain file.")
        if any(found.values()):
            raise PartMissing(
                f"{folder} holds archives but none named {part}; name them train*.tar and val*.tar (or test*).",
                [path for paths in found.values() for path in paths],
            )
    if not any(found.values()):
        return None
    if not found["test"]:
        found["test"] = found.pop("val")
    return {part: paths for part, paths in found.items() if paths}


def open_archives(archives: dict[str, list[Path]]) -> tuple[list[str], dict[str, tuple[ArchiveRecords, list[int]]]]:
    """Return class names, and records with labels of "train" and "test". Raises `DataError`.

    Of archives named val and test those named test are taken, or the others where these have no classes. The records'
    `left_out` counts what is in the archives and not among the images.
    """
    names = [path.name for paths in archives.values() for path in paths]
    for gap in _gaps(names):
        warnings.warn(
            f"{archives['train'][0].parent}: {gap}; fetch what is missing or go on without its images.", stacklevel=2
        )
    chosen, left_out = {"train": archives["train"], "test": archives["test"]}, {"train": Counter(), "test": Counter()}
    samples = {"train": [read_index(path, left_out["train"]) for path in chosen["train"]]}
    try:
        samples["test"] = [read_index(path, left_out["test"]) for path in chosen["test"]]
    except NoClass:
        if "val" not in archives:
            raise
        chosen["test"], left_out["test"] = archives["val"], Counter()
        samples["test"] = [read_index(path, left_out["test"]) for path in chosen["test"]]
    labels = {part: [s.label for listed in samples[part] for s in listed] for part in samples}
    classes = _classes(labels["train"], chosen["train"][0])
    unknown = sorted({str(label) for label in labels["test"]} - set(classes))
    if unknown:
        raise DataError(
            f"Class {unknown[0]} of {chosen['test'][0].parent}'s test archives has no training images; name the "
            "classes of both parts alike."
        )
    number = {name: place for place, name in enumerate(classes)}
    opened = {}
    for part, paths in chosen.items():
        records = archive_records(paths, samples[part], +left_out[part])
        opened[part] = (records, [number[str(label)] for label in labels[part]])
    return classes, opened


def archive_records(
    archives: list[Path], samples: list[list[Sample]], left_out: dict[str, int] | None = None
) -> ArchiveRecords:
    """Return the records of archives, given the samples of each, and what is not among them."""
    count = sum(map(len, samples))
    flat = (value for archive, listed in enumerate(samples) for s in listed for value in (archive, s.offset, s.size))
    places = np.fromiter(flat, np.int64, 3 * count).reshape(count, 3)
    names = [s.name for listed in samples for s in listed]
    stretches = [s.checked for listed in samples for s in listed]
    checked = np.array(stretches, np.int64).reshape(count, 2) if count and None not in stretches else None
    return ArchiveRecords(archives, places, names, dict(left_out or {}), checked)


def read_index(path: Path, left_out: Counter[str] | None = None, *, labelled: bool = True) -> list[Sample]:
    """List the labelled images of one archive, in its order; count in `left_out`, by reason, what is not listed. Of a
    tar that need not be `labelled` all images are listed, with empty labels.

    Raises `DataError`; `NoClass` where no image has a class.
    """
    tar = path.suffix == ".tar"
    index = path.with_suffix(_INDEX) if tar else path.with_name(path.name + _INDEX)
    index = index if index.is_file() else None
    counted = Counter() if left_out is None else left_out
    try:
        return (tfrecord_samples if not tar else tar_samples if labelled else tar_images)(path, index, counted)
    except DataError:
        raise
    except Exception as error:  # whatever damaged bytes lead to
        reason = first_line(error)[:1000]
        if index:
            raise DataError(
                f"Cannot read archive {path} by its index {index.name}: {reason}. Make the index anew or delete it; "
                "if that does not help, fetch the archive again."
            ) from error
        raise DataError(
            f"Cannot read archive {path}: {reason}. Fetch it again, write it anew or leave it out."
        ) from error


def _classes(labels: list[int | str], archive: Path) -> list[str]:
    """Return the names of the classes: their numbers, which begin at 0 or 1 and leave no gaps, or their names."""
    known = set(labels)
    numbers = sorted(label for label in known if isinstance(label, int))
    names = sorted(label for label in known if isinstance(label, str))
    if numbers and names:
        raise DataError(
            f"{archive.parent}: some images have a class number ({numbers[0]}) and others the name of a class or of a "
            f"folder ({names[0]}); needed is one or the other."
        )
    missing = next((place for place, number in enumerate(numbers, (numbers or [0])[0]) if number != place), None)
    if numbers and (numbers[0] not in (0, 1) or missing is not None):
        wrong = f"{numbers[0]} is the first" if numbers[0] not in (0, 1) else f"{missing} is missing"
        raise DataError(
            f"{archive.parent}: class numbers {numbers[:10]} have gaps or begin elsewhere than at 0 or 1 ({wrong}); "
            "number the classes without gaps."
        )
    return names or [str(number) for number in numbers]


def _gaps(names: list[str]) -> list[str]:
    """Say which shards are missing, judged by the numbers in the names of the others."""
    shards: dict[tuple[str, str, str], dict[int, str]] = defaultdict(dict)
    for name in names:
        found = _SHARD.fullmatch(name)
        if found:
            before, number, count, ending = found.groups("")
            shards[before, count, ending][int(number)] = number
    said = []
    for (before, count, ending), numbers in shards.items():
        first, last = (0, int(count) - 1) if count else (min(numbers), max(numbers))
        width = len(next(iter(numbers.values())))
        gone = sorted(set(range(first, min(last, first + 100_000) + 1)) - set(numbers))
        if gone and len(numbers) > (0 if count else 1) and len(gone) < 10 * len(numbers) + 10:
            of = f"-of-{count}" if count else ""
            more = f" and {len(gone) - 1} more" if len(gone) > 1 else ""
            are = "are" if more else "is"
            total = len(numbers) + len(gone)
            said.append(f"{before}{gone[0]:0{width}}{of}{ending}{more} of {total} shards {are} missing")
    return said
