"""CIFAR-10 and CIFAR-100 as their authors publish them: archives or folders, Python or binary version.

Format: https://www.cs.toronto.edu/~kriz/cifar.html. The Python version is pickled, so it is read by
an unpickler that runs nothing (`stablekd_fast.files.pickles`).
"""

import io
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from stablekd_fast.data.formats.arrays import array_split
from stablekd_fast.data.split import Split
from stablekd_fast.errors import DataError
from stablekd_fast.files.pickles import Recorded, array_of, load_recorded
from stablekd_fast.files.reading import DOCUMENT, foreign, open_regular, read_document

_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE

# The archives have at most nine members, of 190 MB in all; one that shows none of them this early is something else.
_MEMBERS_LOOKED_AT = 32

# One file named `test` or `meta` says nothing; two known names do.
_TELLING_MEMBERS = 2

Parser = Callable[[bytes], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class _Layout:
    name: str
    train: tuple[str, ...]
    test: str
    meta: str
    parse: Parser
    parse_names: Callable[[bytes], list[str]]

    @property
    def members(self) -> frozenset[str]:
        return frozenset((*self.train, self.test, self.meta))


def read_cifar(path: Path) -> tuple[str, list[str], Split, Split] | None:
    """Return name ("cifar10", "cifar100"), classes, training and test split; None when `path` is not CIFAR.

    `path` is a `.tar.gz` archive or the folder that it unpacks to, or one above it. Raises `DataError` for damaged or
    incomplete data.
    """
    with foreign(path, DataError, "Fetch the archive again."):
        return _read_cifar(path)


def _read_cifar(path: Path) -> tuple[str, list[str], Split, Split] | None:
    members = _members_of_folder(path) if path.is_dir() else _members_of_archive(path)
    layout = max(_LAYOUTS, key=lambda layout: len(layout.members & members.keys()))
    if len(layout.members & members.keys()) < _TELLING_MEMBERS:
        return None
    missing = sorted(layout.members - members.keys())
    if missing:
        raise DataError(f"{path} lacks {', '.join(missing)} of {layout.name}; fetch the archive again.")
    with foreign(path, DataError, f"It is damaged or not {layout.name}; fetch the archive again."):
        classes = layout.parse_names(members[layout.meta]())
        train = [layout.parse(members[member]()) for member in layout.train]
        test = layout.parse(members[layout.test]())
    images, labels = (np.concatenate(parts) for parts in zip(*train))
    return (
        layout.name,
        classes,
        array_split(f"{path}, training part", images, labels, len(classes)),
        array_split(f"{path}, test part", *test, len(classes)),
    )


def _members_of_folder(folder: Path) -> dict[str, Callable[[], bytes]]:
    places = [folder, *sorted(child for child in folder.iterdir() if child.is_dir())]
    known = frozenset().union(*(layout.members for layout in _LAYOUTS))
    for place in places:
        found: dict[str, Callable[[], bytes]] = {}
        for name in known:
            if (place / name).is_file():
                found[name] = partial(read_document, place / name)
        if len(found) >= _TELLING_MEMBERS:
            return found
    return {}


def _members_of_archive(path: Path) -> dict[str, Callable[[], bytes]]:
    """Read members into memory, by base name: nothing is ever unpacked to disk."""
    known = frozenset().union(*(layout.members for layout in _LAYOUTS))
    found: dict[str, Callable[[], bytes]] = {}
    with open_regular(path) as packed, tarfile.open(fileobj=packed, mode="r:gz") as archive:
        room = DOCUMENT
        for seen, member in enumerate(archive):
            room -= max(member.size, 0)
            if seen >= _MEMBERS_LOOKED_AT or room < 0:
                break
            name = Path(member.name).name
            file = archive.extractfile(member) if member.isfile() and name in known else None
            if file is not None:
                content = file.read()
                found[name] = lambda content=content: content
    return found


def _unpickle(content: bytes) -> dict:
    # Written by Python 2, whose byte strings hold both text and pixels: Latin-1 keeps either intact.
    loaded = load_recorded(io.BytesIO(content))
    if not isinstance(loaded, dict):
        raise ValueError(f"a dictionary is needed, found {type(loaded).__name__}")
    return {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in loaded.items()}


def _pickled_batch(label_key: str) -> Parser:
    def parse(content: bytes) -> tuple[np.ndarray, np.ndarray]:
        batch = _unpickle(content)
        return _images(array_of(batch["data"])), _labels(batch[label_key])

    return parse


def _labels(found: object) -> np.ndarray:
    if isinstance(found, Recorded):
        return array_of(found)
    if not isinstance(found, list) or not all(type(label) is int for label in found):
        raise ValueError(f"labels are a {type(found).__name__}, needed is a list of whole numbers")
    return np.asarray(found)


def _pickled_names(key: str) -> Callable[[bytes], list[str]]:
    def parse(content: bytes) -> list[str]:
        names = _unpickle(content)[key]
        if not isinstance(names, list) or not all(isinstance(name, (bytes, str)) for name in names):
            raise ValueError(f"{key} are a {type(names).__name__}, needed is a list of names")
        return [name.decode() if isinstance(name, bytes) else name for name in names]

    return parse


def _binary_batch(label_bytes: int) -> Parser:
    def parse(content: bytes) -> tuple[np.ndarray, np.ndarray]:
        records = np.frombuffer(content, np.uint8).reshape(-1, label_bytes + _PIXELS)
        # CIFAR-100 puts the coarse label first and the fine one second.
        return _images(records[:, label_bytes:]), records[:, label_bytes - 1].astype(np.int64)

    return parse


def _text_names(content: bytes) -> list[str]:
    return content.decode().split()


def _images(rows: np.ndarray) -> np.ndarray:
    """Turn rows uint8 `[N, 3072]`, channel after channel, into images `[N, 32, 32, 3]`."""
    if rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] != _PIXELS:
        raise ValueError(f"images are {rows.dtype} {list(rows.shape)}, needed is uint8 [N, {_PIXELS}]")
    return rows.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1)


_LAYOUTS = (
    _Layout(
        name="cifar10",
        train=tuple(f"data_batch_{part}" for part in range(1, 6)),
        test="test_batch",
        meta="batches.meta",
        parse=_pickled_batch("labels"),
        parse_names=_pickled_names("label_names"),
    ),
    _Layout(
        name="cifar10",
        train=tuple(f"data_batch_{part}.bin" for part in range(1, 6)),
        test="test_batch.bin",
        meta="batches.meta.txt",
        parse=_binary_batch(label_bytes=1),
        parse_names=_text_names,
    ),
    _Layout(
        name="cifar100",
        train=("train",),
        test="test",
        meta="meta",
        parse=_pickled_batch("fine_labels"),
        parse_names=_pickled_names("fine_label_names"),
    ),
    _Layout(
        name="cifar100",
        train=("train.bin",),
        test="test.bin",
        meta="fine_label_names.txt",
        parse=_binary_batch(label_bytes=2),
        parse_names=_text_names,
    ),
)
