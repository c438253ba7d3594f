"""Writers of archives, independent of the code that reads them."""

from __future__ import annotations

import io
import struct
import tarfile
from collections.abc import Iterable
from pathlib import Path

from PIL import Image


def picture_bytes(level: int = 100, kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (level % 256, 2, 3)).save(file, kind)
    return file.getvalue()


def tar_bytes(members: Iterable[tuple], **settings) -> bytes:
    """Pack members: name and content, or name, type and what a link leads to."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", **settings) as archive:
        for name, content, *target in members:
            info = tarfile.TarInfo(name)
            if target:
                info.type, info.linkname = content, target[0]
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def write_tar(path: Path, members: Iterable[tuple] | dict[str, bytes], **settings) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(members.items() if isinstance(members, dict) else members, **settings))
    return path


def varint(number: int) -> bytes:
    parts = bytearray()
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    return bytes([*parts, number])


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def masked_crc32c(content: bytes) -> bytes:
    """The checksum of TFRecords, bit by bit."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def feature(*values: bytes | int | float) -> bytes:
    """A Feature: a list of bytes, of whole numbers (packed) or of fractions, as its values are; empty without any."""
    if not values:
        return b""
    if isinstance(values[0], bytes):
        return field(1, b"".join(field(1, value) for value in values))
    if isinstance(values[0], float):
        return field(2, field(1, struct.pack(f"<{len(values)}f", *values)))
    return field(3, field(1, b"".join(varint(value % 2**64) for value in values)))


def example(features: dict[str | bytes, bytes]) -> bytes:
    """A tf.train.Example of features that are packed already."""
    keys = [(key.encode() if isinstance(key, str) else key, value) for key, value in features.items()]
    return field(1, b"".join(field(1, field(1, key) + field(2, value)) for key, value in keys))


def framed(record: bytes) -> bytes:
    """A record of a TFRecord file."""
    length = struct.pack("<Q", len(record))
    return length + masked_crc32c(length) + record + masked_crc32c(record)


def write_tfrecords(path: Path, records: Iterable[dict[str | bytes, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(framed(example(features)) for features in records))
    return path
