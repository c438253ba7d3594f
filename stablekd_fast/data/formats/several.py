"""Several sources of images as one data set, and a test split for one that has none."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from stablekd_fast.data.formats.encoded import Encoded
from stablekd_fast.data.records import ArchiveRecords, FileRecords, JoinedRecords, Records
from stablekd_fast.errors import DataError, printable

TEST_SHARE, MOST_TEST = 0.04, 10_000
"""This part of the images, and at most so many, is held out as a test split where there is none."""


def merged(sources: Sequence[Records]) -> tuple[Records, int]:
    """Return the images of all sources, each once, and how many were there again."""
    if len(sources) == 1 and not _names_twice(sources[0]):
        return sources[0], 0
    seen: set[str] = set()
    chosen, twice = [], 0
    for records in sources:
        new = []
        for number, key in enumerate(_places(records)):
            if key not in seen:
                seen.add(key)
                new.append(number)
        twice += len(records) - len(new)
        if new:
            chosen.append(records if len(new) == len(records) else records.taken(new))
    if not chosen:
        return FileRecords("", []), twice
    return chosen[0] if len(chosen) == 1 else JoinedRecords(chosen), twice


def joined(found: Sequence[Encoded]) -> Encoded:
    """Return the images of all sources as one data set.

    Training images keep their labels where all sources have the same classes. A test or validation split is made of
    those of the sources that have labels, where there are some, else of the others. Raises `DataError` for an image
    that would be trained and tested on.
    """
    if len(found) == 1:
        return found[0]
    root = Path(", ".join(source.root.resolve().name for source in found))
    classes, notes = _common_classes(found), []
    parts: dict[str, tuple[Records, list[int] | None]] = {}
    for part in ("train", "validation", "test"):
        own = [source for source in found if part in source.parts]
        labelled = [source for source in own if classes and source.parts[part][1] is not None]
        if part != "train" and labelled and len(labelled) < len(own):
            notes.append(f"Of the {part} images those of {_names(own, labelled)} are not used: they have no labels.")
            own = labelled
        if part == "train" and labelled and len(labelled) < len(own):
            notes.append(
                f"The labels of the training images of {_names(labelled)} are not used, as those of "
                f"{_names(own, labelled)} have none."
            )
        if own:
            parts[part], twice = _joined_part([source.parts[part] for source in own], keeps=len(labelled) == len(own))
            notes += [f"{twice:,} {part} images are in several sources; each is used once."] if twice else []
    _refuse_leaks(parts)
    if not classes and any(source.classes for source in found):
        notes.append(f"No labels are used: the classes of {_names([s for s in found if s.classes])} differ.")
    counts: dict[str, int] = {}
    for source in found:
        counts |= {reason: counts.get(reason, 0) + count for reason, count in source.left_out.items()}
    return Encoded(root, classes, parts, [*(note for source in found for note in source.notes), *notes], counts)


def with_test(found: Encoded) -> Encoded:
    """Return the images with a test split: a part of the training images where there is none of its own, chosen by
    their names alone. Raises `DataError` where there are fewer than two."""
    if "test" in found.parts:
        return found
    records, labels = found.parts["train"]
    count = min(max(round(TEST_SHARE * len(records)), 1), MOST_TEST)
    if len(records) < 2:
        raise DataError(
            f"{printable(found.root)} holds {len(records)} image; at least 2 are needed, one to test on. Add some."
        )
    keys = [hashlib.blake2b(told, digest_size=8).digest() for told in records.told_by()]
    held_out = set(sorted(range(len(keys)), key=keys.__getitem__)[:count])
    parts = dict(found.parts)
    for part, chosen in (
        ("train", [n for n in range(len(records)) if n not in held_out]),
        ("test", sorted(held_out)),
    ):
        parts[part] = records.taken(chosen), None if labels is None else [labels[n] for n in chosen]
    note = f"There is no test split: {count:,} of {len(records):,} images are held out as one."
    return Encoded(found.root, found.classes, parts, [*found.notes, note], found.left_out)


def _common_classes(found: Sequence[Encoded]) -> list[str]:
    """The classes of the sources that have labels; none where they differ."""
    kinds = [source.classes for source in found if source.classes]
    return kinds[0] if kinds and all(kind == kinds[0] for kind in kinds) else []


def _joined_part(
    parts: list[tuple[Records, list[int] | None]], *, keeps: bool
) -> tuple[tuple[Records, list[int] | None], int]:
    """The images of one part of several sources, with their labels where it `keeps` them."""
    records, twice = merged([records for records, _ in parts])
    if not keeps:
        return (records, None), twice
    by_place: dict[str, int] = {}
    for source, labels in parts:
        for place, label in zip(_places(source), labels or []):
            if by_place.setdefault(place, label) != label:
                raise DataError(f"{printable(place)} has two classes in several sources; give it once.")
    return (records, [by_place[place] for place in _places(records)]), twice


def _refuse_leaks(parts: dict[str, tuple[Records, list[int] | None]]) -> None:
    trained = set(_places(parts["train"][0]))
    for part in ("validation", "test"):
        shared = [place for place in _places(parts[part][0]) if place in trained] if part in parts else []
        if shared:
            raise DataError(
                f"{len(shared):,} {part} images are training images of another source too, the first: "
                f"{printable(shared[0])}. Leave one of the two sources out."
            )


def _names_twice(records: Records) -> bool:
    return isinstance(records, FileRecords) and len(set(records.names)) < len(records)


def _places(records: Records) -> Iterator[str]:
    """Where each image lies, alike for one that several sources hold."""
    if isinstance(records, JoinedRecords):
        for source in records.sources:
            yield from _places(source)
    elif isinstance(records, FileRecords):
        folder = os.path.realpath(records.folder)
        yield from (os.path.normpath(os.path.join(folder, name)) for name in records.names)
    elif isinstance(records, ArchiveRecords):
        archives = [os.path.realpath(path) for path in records.archives]
        for name, archive in zip(records.names, records.places[:, 0].tolist()):
            yield f"{archives[archive]}/{name}"
    else:
        yield from (str(records.name(number)) for number in range(len(records)))


def _names(sources: Sequence[Encoded], but: Sequence[Encoded] = ()) -> str:
    return ", ".join(printable(source.root) for source in sources if source not in but)
