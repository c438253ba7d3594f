"""Samples of tars: images, and the classes that members beside them, folders or a list give them.

Where members hold classes, these count and folders do not. A sample is then what has the same name up to its first dot,
or what has the name of the class member: `000001.jpg`, `000001.input.jpg` and `000001.seg.png` belong to `000001.cls`,
and `img.001.jpg` to `img.001.cls`. Of several images of a sample the one that is called `KEY.jpg` is taken, then
`KEY.input.jpg`, `KEY.image.jpg` or `KEY.img.jpg`, then any other; the first kind that any image has gives all classes
of a tar:

1. `KEY.cls`: a number or a name;
2. `KEY.cls.txt`, the same;
3. `KEY.json`: the first of `label`, `cls`, `class`, `class_id`, `label_name`, `class_name` that is a number or a name;
4. the folder that an image lies in, unless all folders are called as the parts of a data set are (`train`, `val`);
5. `KEY.txt`, a number or a name: captions of several lines are none;
6. a list beside the archive, as `ground_truth.py` reads them.

In folders every image is a sample, whatever dots its name has; but `x.seg.png` beside `x.jpg` belongs to the latter.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from stablekd_fast.data.formats.ground_truth import classes_beside, missing_classes
from stablekd_fast.data.formats.sample import NoClass, Sample, class_of
from stablekd_fast.data.formats.tars import walk
from stablekd_fast.data.pixels import IMAGE_SUFFIXES
from stablekd_fast.files.reading import open_regular

PARTS = {"train": "train", "val": "val", "validation": "val", "test": "test"}
"""What archives and folders of a part are called, and which part it is."""
_KINDS = ("cls", "cls.txt", "json", "txt")
"""Endings of members that hold classes, the most telling first."""
_JSON_KEYS = ("label", "cls", "class", "class_id", "label_name", "class_name")
_MAIN_IMAGES = ("input", "image", "img")
_SUFFIXES = frozenset((".cls", ".txt", ".json"))
_LONGEST = 1 << 20
_LARGEST_CLASS = 10**18
_HIDDEN, _OTHER, _EXTRA = "hidden file", "not an image", "another image of a sample"
_NO_CLASS, _NO_IMAGE, _NO_TARGET = "no class", "class without an image", "link to nothing"

_Label = int | str


@dataclass
class _Contents:
    """What a tar holds: where its images lie, what its members say of classes, and what its links stand for."""

    images: dict[str, tuple[int, int]] = field(default_factory=dict)
    labels: dict[str, dict[str, _Label | ValueError | None]] = field(
        default_factory=lambda: {kind: {} for kind in _KINDS}
    )
    links: dict[str, str] = field(default_factory=dict)
    unreadable: ValueError | None = None
    """What is wrong with an image's JSON, which matters unless something else gives the classes."""


def tar_samples(path: Path, index: Path | None, left_out: Counter[str]) -> list[Sample]:
    """List the images of a tar that have a class, in its order, and count in `left_out` what is not listed.

    Raises ValueError where the tar is damaged or says two things of one sample, `NoClass` where no image has a class.
    """
    contents = _contents(path, index, left_out)
    _follow_links(contents, left_out)
    if not contents.images:
        raise ValueError(f"it holds no images{_counted(left_out)}")
    for kind in ("cls", "cls.txt", "json", "folder", "txt"):
        samples = _by_folder(contents, left_out) if kind == "folder" else _by_members(contents, kind, left_out)
        if samples:
            return samples
    samples = _by_list(path, contents, left_out)
    if not samples and contents.unreadable:
        raise contents.unreadable
    if not samples:
        raise NoClass(missing_classes(path, next(iter(contents.images)), len(contents.images)))
    return samples


def tar_images(path: Path, index: Path | None, left_out: Counter[str]) -> list[Sample]:
    """List the images of a tar as `tar_samples` does, but whether they have a class or not: the labels are empty."""
    contents = _contents(path, index, left_out)
    _follow_links(contents, left_out)
    if not contents.images:
        raise ValueError(f"it holds no images{_counted(left_out)}")
    samples = []
    for name, place in contents.images.items():
        if name.rpartition("/")[2].count(".") > 1 and _belongs_to_another(name, contents.images):
            left_out[_EXTRA] += 1
        else:
            samples.append(Sample(name, *place, ""))
    return samples


def _contents(path: Path, index: Path | None, left_out: Counter[str]) -> _Contents:
    contents, best = _Contents(), len(_KINDS)
    images, links = contents.images, contents.links
    with open_regular(path) as file:
        for name, offset, size, target in walk(file, index):
            if name.startswith(".") or "/." in name or "__MACOSX" in name:
                left_out[_HIDDEN] += 1
                continue
            suffix = name[name.rfind(".") :].lower()
            if suffix in IMAGE_SUFFIXES:
                if name in images:
                    raise ValueError(f"{name} is in it twice; write the archive anew with each name once")
                images[name] = (offset, size)
            elif suffix in _SUFFIXES:
                key, kind = _key_and_kind(name)
                if _KINDS.index(kind) > best:  # better ones are there
                    continue
                labels = contents.labels[kind]
                if key in labels:
                    raise ValueError(f"{name} is in it twice; write the archive anew with each name once")
                labels[key] = _read(file, kind, name, offset, size) if target is None else None
                best = best if labels[key] is None else min(best, _KINDS.index(kind))
            else:
                left_out[_OTHER] += 1
                continue
            if target is not None:
                links[name] = target
    return contents


def _read(file: BinaryIO, kind: str, name: str, offset: int, size: int) -> _Label | ValueError | None:
    """Read the class in a member; an error counts once an image is found that it belongs to."""
    file.seek(offset)
    content = file.read(min(size, _LONGEST))
    if kind == "json" and size > _LONGEST:
        return None
    try:
        return _class_in_json(content) if kind == "json" else class_of(content)
    except ValueError as error:
        return ValueError(f"{name} {error}") if kind != "txt" else None  # which is a caption


def _key_and_kind(name: str) -> tuple[str, str]:
    """Split the name of a member that may hold a class."""
    lower = name.lower()
    kind = next(kind for kind in _KINDS if lower.endswith(f".{kind}"))
    return name[: -len(kind) - 1], kind


def _class_in_json(content: bytes) -> _Label | None:
    """Return the class in a JSON object; None where it is no object or has no key for it."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"cannot be read as JSON ({str(error) or type(error).__name__})") from error
    values = [found[key] for key in _JSON_KEYS if key in found] if isinstance(found, dict) else []
    for value in values:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) < _LARGEST_CLASS:
            return value
        if isinstance(value, str) and value.strip():
            return class_of(value.encode("utf-8", "backslashreplace"))
    if any(value is not None for value in values):
        raise ValueError(f"holds {str(values)[1:60]} as its class, which is neither a number nor a name")
    return None


def _follow_links(contents: _Contents, left_out: Counter[str]) -> None:
    """Give links the place, or the class, of the member that they stand for; leave out those that lead nowhere."""
    for name in contents.links:
        target, hops = contents.links[name], 0
        while target in contents.links and hops < 40:
            target, hops = contents.links[target], hops + 1
        if name in contents.images:
            if target in contents.images and target not in contents.links:
                contents.images[name] = contents.images[target]
            else:
                del contents.images[name]
                left_out[_NO_TARGET] += 1
        elif target[target.rfind(".") :].lower() in _SUFFIXES:
            (key, kind), (from_key, from_kind) = _key_and_kind(name), _key_and_kind(target)
            contents.labels[kind][key] = contents.labels[from_kind].get(from_key)


def _by_members(contents: _Contents, kind: str, left_out: Counter[str]) -> list[Sample]:
    """List the images that a member of this kind gives a class."""
    labels = contents.labels[kind]
    if not labels:
        return []
    chosen: dict[str, tuple[str, _Label]] = {}
    broken, extra, without = None, 0, 0
    for name in contents.images:
        key = name[: name.rindex(".")]
        if key not in labels:
            key = _first_dot(name)
        label = labels.get(key)
        if isinstance(label, ValueError):
            broken = label
        if isinstance(label, ValueError) or label is None:
            without += 1
        elif key not in chosen:
            chosen[key] = name, label
        else:
            extra += 1
            chosen[key] = _main_image(key, chosen[key][0], name), label
    if broken and (chosen or kind != "json"):
        raise broken
    contents.unreadable = contents.unreadable or broken
    if chosen:
        left_out.update({_EXTRA: extra, _NO_CLASS: without, _NO_IMAGE: len(labels) - len(chosen)})
    return [Sample(name, *contents.images[name], label) for name, label in chosen.values()]


def _first_dot(name: str) -> str:
    place = name.find(".", name.rfind("/") + 1)
    return name[:place]


def _main_image(key: str, first: str, second: str) -> str:
    """Return which of two images of a sample is the one to train on. Raises ValueError where nothing tells."""
    ranks = [_rank(key, name) for name in (first, second)]
    if ranks[0] == ranks[1]:
        raise ValueError(
            f"{first} and {second} are both images of the sample {key}; call the one to train on {key}.jpg and the "
            f"other one {key}.WORD.jpg"
        )
    return first if ranks[0] < ranks[1] else second


def _rank(key: str, name: str) -> int:
    words = name[len(key) + 1 :].lower().split(".")[:-1]
    return 0 if not words else 1 if words[0] in _MAIN_IMAGES and len(words) == 1 else 2


def _by_folder(contents: _Contents, left_out: Counter[str]) -> list[Sample]:
    """List the images that lie in a folder, whose name is their class."""
    samples: list[Sample] = []
    extra = without = 0
    for name, place in contents.images.items():
        path, _, base = name.rpartition("/")
        folder = path.rpartition("/")[2]
        if not folder:
            without += 1
        elif base.count(".") > 1 and _belongs_to_another(name, contents.images):
            extra += 1
        else:
            samples.append(Sample(name, *place, sys.intern(folder)))
    if all(str(sample.label).lower() in PARTS for sample in samples):
        return []
    left_out.update({_EXTRA: extra, _NO_CLASS: without})
    return samples


def _belongs_to_another(name: str, images: dict[str, tuple[int, int]]) -> bool:
    """Return whether an image is `x.seg.png` beside `x.jpg`, whose ending is another one and whose word no number."""
    key = _first_dot(name)
    word, _, ending = name[len(key) + 1 :].rpartition(".")
    if any(part.isdigit() for part in word.split(".")):
        return False
    return any(f"{key}.{other}" in images for other in _plain_endings() if other.lower() != ending.lower())


def _plain_endings() -> Iterator[str]:
    for suffix in IMAGE_SUFFIXES:
        yield suffix[1:]
        yield suffix[1:].upper()


def _by_list(path: Path, contents: _Contents, left_out: Counter[str]) -> list[Sample]:
    """List the images that a file beside the archive gives a class."""
    classes = classes_beside(path, contents.images)
    samples = [
        Sample(name, *place, classes[stem])
        for name, place in contents.images.items()
        if (stem := name[name.rfind("/") + 1 : name.rindex(".")]) in classes
    ]
    if samples:
        left_out.update({_NO_CLASS: len(contents.images) - len(samples)})
    return samples


def _counted(left_out: Counter[str]) -> str:
    listed = ", ".join(f"{reason}: {count}" for reason, count in left_out.items() if count)
    return f" ({listed})" if listed else ""
