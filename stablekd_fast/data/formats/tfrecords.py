"""Samples of TFRecords: a `tf.train.Example` each, read without unpacking their images.

The image is the only value of `image/encoded`, `encoded` or `image`; its class is that of the first of these keys that
has a value: `image/class/label`, `label`, `cls`, `class`, `class_id` (a number or a name), then `image/class/synset`,
`image/class/text`, `label_name`, `class_name` (a name). A class of -1 stands for none.

The checksum of each record's length is checked when the file is listed. That of its content, which listing reads a few
hundred bytes of, is checked whenever its image is read.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator, Sized
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from stablekd_fast.data.formats.sample import NoClass, Sample, class_of
from stablekd_fast.files.checksums import masked_crc32c
from stablekd_fast.files.reading import open_regular, read_document

_IMAGE_KEYS = ("image/encoded", "encoded", "image")
_LABEL_KEYS = (
    "image/class/label", "label", "cls", "class", "class_id",
    "image/class/synset", "image/class/text", "label_name", "class_name",
)  # fmt: skip
_BYTES, _FLOATS, _NUMBERS = 1, 2, 3
"""Kinds of lists in a Feature."""
_FRAME = 16
"""Length (8 bytes) and its checksum (4) before the content, and the content's checksum (4) behind it."""
_LONGEST = 2000
"""Keys and names of classes have fewer bytes."""
_MANY = 7
"""So many values are counted, where one is needed."""
_NO_IMAGE, _NO_CLASS = "no image", "no class"


def tfrecord_samples(path: Path, index: Path | None, left_out: Counter[str]) -> list[Sample]:
    """List the images of a file that have a class, in its order, and count in `left_out` what is not listed.

    Raises ValueError where the file is damaged or says two things of one image, `NoClass` where no image has a class.
    """
    samples: list[Sample] = []
    number = -1
    with open_regular(path) as file:
        for number, (offset, size) in enumerate(_records(file, index)):
            try:
                image, label = _example(file, offset + 12, offset + size - 4)
            except ValueError as error:
                raise ValueError(f"record {number} at byte {offset}: {error}") from error
            if image is None:
                left_out[_NO_IMAGE] += 1
            elif label is None or label == -1:
                left_out[_NO_CLASS] += 1
            else:
                samples.append(Sample(f"{number}", *image, label, (offset + 12, size - _FRAME)))
    if number < 0:
        raise ValueError("it is empty")
    if not samples and left_out[_NO_CLASS]:
        raise NoClass(
            f"None of the {number + 1} records in {path} has a class; give them a value of {_LABEL_KEYS[0]} or another "
            f"of {', '.join(_LABEL_KEYS[1:])}."
        )
    if not samples:
        raise ValueError(f"none of its {number + 1} records has a value of {', '.join(_IMAGE_KEYS)}")
    return samples


# Records.


def _records(file: BinaryIO, index: Path | None) -> Iterator[tuple[int, int]]:
    """Give place and length of each record, its frame included, as the records or an index say."""
    end = file.seek(0, 2)
    at = 0
    if index is None:
        while at < end:
            size = _record_size(file, at, end)
            yield at, size
            at += size
        return
    for line in read_document(index).decode("utf-8", "backslashreplace").splitlines():
        words = line.split()
        if len(words) != 2 or not all(word.isdecimal() and len(word) < 19 for word in words):
            raise ValueError(f"its line {line[:60]!r} is not OFFSET SIZE")
        offset, size = int(words[0]), int(words[1])
        if offset != at or _record_size(file, at, end) != size:
            raise ValueError(f"it says that a record of {size} bytes begins at byte {offset}, and the file has none")
        yield offset, size
        at += size
    if at != end:
        raise ValueError(f"its records end at byte {at}, and the file ends at {end}")


def _record_size(file: BinaryIO, at: int, end: int) -> int:
    if at + _FRAME > end:
        raise ValueError(f"the file ends at {end}, in the midst of a record that begins at byte {at}")
    file.seek(at)
    head = file.read(12)
    if at == 0 and head.startswith(b"\x1f\x8b"):
        raise ValueError("it is compressed by gzip, and images are read in place: write it without compression")
    size, checksum = struct.unpack("<QI", head)
    if at + size + _FRAME > end:
        raise ValueError(f"a record at byte {at} would be {size} bytes long, and the file ends at {end}")
    if masked_crc32c(head[:8]) != checksum:
        raise ValueError(f"the length of the record at byte {at} does not fit its checksum")
    return size + _FRAME


# Examples.


def _example(file: BinaryIO, start: int, stop: int) -> tuple[tuple[int, int] | None, int | str | None]:
    """Return place and length of the image in an Example, and its class; None for what is missing."""
    places: dict[str, tuple[int, int]] = {}
    for key, place, length in _features(file, start, stop):
        if key in _IMAGE_KEYS or key in _LABEL_KEYS:
            if key in places:
                raise ValueError(f"it has {key} twice")
            places[key] = place, length
    image = label = None
    for key in _IMAGE_KEYS:
        if image is None and key in places:
            image = _image(file, key, *places[key])
    for key in _LABEL_KEYS:
        if label is None and key in places:
            label = _label(file, key, *places[key])
    return image, label


def _features(file: BinaryIO, start: int, stop: int) -> Iterator[tuple[str, int, int]]:
    """Find name, and place of the Feature message, of each entry: Example.features (1) . feature (1, a map: key 1,
    value 2)."""
    for _, at, length in _fields(file, start, stop):
        for _, entry, entry_length in _fields(file, at, at + length):
            key, place, size = _entry(file, entry, entry_length)
            try:
                yield key.decode(), place, size
            except UnicodeDecodeError as error:
                raise ValueError(f"its key {key[:40]!r} is no UTF-8 text") from error


def _entry(file: BinaryIO, start: int, length: int) -> tuple[bytes, int, int]:
    """Return key, and place of the value, of an entry of a map."""
    head = _read(file, start, min(length, 140))
    if len(head) > 1 and head[0] == 10 and head[1] < 128:  # a short key comes first, as all writers have it
        key_end = 2 + head[1]
        if key_end + 10 < len(head) and head[key_end] == 18:
            size, used = _varint(head, key_end + 1)
            if used + size == length:
                return head[2:key_end], start + used, size
    parts = {field: (place, size) for field, place, size in _fields(file, start, start + length)}
    if 1 not in parts:
        raise ValueError(f"an entry at byte {start} has no key, which belongs to no tf.train.Example")
    place, size = parts[1]
    return _read(file, place, min(size, _LONGEST)), *parts.get(2, (place, 0))


def _image(file: BinaryIO, key: str, start: int, length: int) -> tuple[int, int] | None:
    kind, values = _values(file, key, start, length)
    if values and kind != _BYTES:
        raise ValueError(f"its {key} is a list of numbers, and needed is an encoded image")
    return values[0] if values else None


def _label(file: BinaryIO, key: str, start: int, length: int) -> int | str | None:
    kind, values = _values(file, key, start, length)
    if not values:
        return None
    place, size = values[0]
    if kind == _BYTES:
        try:
            return class_of(_read(file, place, min(size, _LONGEST)))
        except ValueError as error:
            raise ValueError(f"its {key} {error}") from error
    value = _varint(_read(file, place, size), 0)[0]
    return value - (1 << 64) if value >= 1 << 63 else value


def _values(file: BinaryIO, key: str, start: int, length: int) -> tuple[int, list[tuple[int, int]]]:
    """Find the value of a Feature, or none: a list of bytes (1) or of numbers (3), whose values are its field 1,
    the numbers each or packed into one. Raises ValueError where there are several."""
    lists = list(islice(_fields(file, start, start + length), _MANY))
    if not lists:
        return 0, []
    if len(lists) > 1:
        raise ValueError(f"its {key} has {_counted(lists)} lists of values, and needed is one")
    kind, at, length = lists[0]
    if kind not in (_BYTES, _NUMBERS):
        what = "a list of fractions" if kind == _FLOATS else f"of kind {kind}"
        raise ValueError(f"its {key} is {what}, and needed are bytes or whole numbers")
    values = ((place, size) for number, place, size in _fields(file, at, at + length) if number == 1)
    found = list(islice(((place, size) for place, size in values if size or kind == _BYTES), _MANY))
    count = len(found)
    if kind == _NUMBERS and count == 1:
        packed = _read(file, found[0][0], min(found[0][1], 64))
        count = sum(byte < 128 for byte in packed)
    if count > 1:
        raise ValueError(f"its {key} has {_counted(range(count))} values, and needed is one")
    return kind, found[:count]


def _counted(found: Sized) -> str:
    return str(len(found)) if len(found) < _MANY else "many"


def _fields(file: BinaryIO, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Find number, and place of the content, of each field of a protobuf message, without reading the contents."""
    while start < stop:
        file.seek(start)
        head = file.read(min(20, stop - start))
        tag, used = (head[0], 1) if head[0] < 128 else _varint(head, 0)  # most are so short
        kind = tag & 7
        if kind == 2:
            length, used = (head[1], 2) if used == 1 < len(head) and head[1] < 128 else _varint(head, used)
        elif kind == 0:
            length = _varint(head, used)[1] - used
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
        if at >= len(content):
            raise ValueError("a number goes on behind the end of the message that holds it")
        byte = content[at]
        value, at, shift = value | (byte & 127) << shift, at + 1, shift + 7
        if byte < 128:
            return value, at
