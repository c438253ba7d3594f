"""Tar archives, walked through from header to header without unpacking; tars inside of them too.

What a tar holds is checked: each header by its sum, each member by where the archive ends.
"""

from __future__ import annotations

import os
import posixpath
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO
from zlib import adler32

from stablekd_fast.files.reading import read_document

Member = tuple[str, int, int, str | None]
"""Name, offset and size; for a link the name of the member that it stands for, else None."""

_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_FILES, _LINKS, _WITHOUT_CONTENT = b"0\0" + b"7", b"12", b"3456"
_LONG_NAME, _LONG_TARGET, _PAX, _SPARSE = b"L", b"K", b"xX", b"S"
_LONGEST = 1 << 20
"""More bytes than this no header has that extends another one."""
_LONGEST_NAME = 4096
"""Systems take no longer paths."""
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


def walk(file: BinaryIO, index: Path | None = None) -> Iterator[Member]:
    """List files and links of an open tar, in its order; what an index file lists, if there is one.

    A tar inside is listed as a folder with its name, one level deep. Raises ValueError where the archive is damaged
    or the index does not belong to it.
    """
    end = file.seek(0, os.SEEK_END)
    for member in _indexed(file, end, index) if index else _walk(file, 0, end):
        name, offset, size, target = member
        if not name.endswith(".tar") or target is not None or posixpath.basename(name).startswith("."):
            yield member
            continue
        folder, empty = name.removesuffix(".tar"), True
        try:
            for inner, place, length, target in _walk(file, offset, offset + size):
                yield f"{folder}/{inner}", place, length, None if target is None else f"{folder}/{target}"
                empty = False
        except ValueError as error:
            raise ValueError(f"{name} in it: {error}") from error
        if empty:
            raise ValueError(f"{name} in it is empty")


def _walk(file: BinaryIO, start: int, stop: int) -> Iterator[Member]:
    if start == stop:
        raise ValueError("it is empty")
    at, ended, extended = start, False, {}
    while at + _BLOCK <= stop:
        file.seek(at)
        header = file.read(_BLOCK)
        if header == _ZEROS:
            at, ended = _past_zeros(file, at, stop), True
            continue
        if not _is_header(header):
            if ended:  # what some tools leave behind the end
                return
            raise ValueError(_no_header(header, at, start))
        ended = False
        kind, size = header[156:157], _number(header[124:136])
        if kind in _LINKS or kind in _WITHOUT_CONTENT:
            size = 0
        size = _whole(extended["size"]) if "size" in extended else size
        content, at = at + _BLOCK, at + _BLOCK + -(-size // _BLOCK) * _BLOCK
        if content + size > stop:
            raise ValueError(f"the member at byte {content} would be {size} bytes long, and the archive ends at {stop}")
        if kind in (_LONG_NAME, _LONG_TARGET) or kind in _PAX:
            extended |= _extension(file, kind, content, size)
            continue
        name = extended.get("path") or _name(header)
        if kind == _SPARSE or any(key.startswith("GNU.sparse.") for key in extended):
            raise ValueError(f"{name} is stored with holes; write the archive without --sparse")
        if kind in _FILES and not name.endswith("/"):
            yield _tidy(name), content, size, None
        elif kind in _LINKS:
            target = extended.get("linkpath") or _text(header[157:257])
            folder = posixpath.dirname(_tidy(name)) if kind == b"2" else ""
            target = posixpath.join(folder, target) if kind == b"2" else _tidy(target)
            yield _tidy(name), content, 0, posixpath.normpath(target)
        extended = {}
    if not ended:
        _require_end(file, start, at, stop)


def _require_end(file: BinaryIO, start: int, at: int, stop: int) -> None:
    if at < stop:
        file.seek(at)
        raise ValueError(
            _no_header(file.read(stop - at), at, start)
            if at == start
            else f"it ends in the midst of a header, at byte {stop}"
        )
    warnings.warn(
        f"{file.name} ends at byte {stop} without the mark that ends a tar; if it was cut short, fetch it again.",
        stacklevel=2,
    )


def _past_zeros(file: BinaryIO, at: int, stop: int) -> int:
    """Return where the first block begins that is not empty: tars that were joined go on behind an end."""
    while at < stop:
        file.seek(at)
        chunk = file.read(min(_LONGEST, stop - at))
        rest = len(chunk.lstrip(b"\0"))
        if rest or not chunk:
            return at + (len(chunk) - rest) // _BLOCK * _BLOCK
        at += len(chunk)
    return stop


def _is_header(header: bytes) -> bool:
    """Return whether the sum in a header is that of its bytes, with blanks in place of the sum."""
    try:
        said = int(header[148:156].strip(b" \0"), 8)
    except ValueError:
        return False
    # The low half of Adler-32 is the sum of all bytes and 1, modulo 65,521: much faster than a sum in Python.
    return adler32(header) & 0xFFFF == (1 + said - 8 * ord(" ") + sum(header[148:156])) % 65_521


def _no_header(header: bytes, at: int, start: int) -> str:
    if at == start:
        for magic, name in _COMPRESSED.items():
            if header.startswith(magic):
                return f"it is compressed by {name}, and images are read in place: unpack it to a plain tar"
        return f"it is no tar: it begins with {header[:12]!r}"
    return f"there is no header of a member at byte {at}, where one must be"


def _number(field: bytes) -> int:
    """Read a number in octal digits or, with the highest bit set, in binary."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    return _whole(field.partition(b"\0")[0].strip() or b"0", 8)


def _whole(digits: str | bytes, base: int = 10) -> int:
    try:
        if digits.isdigit() and len(digits) <= 20:
            return int(digits, base)
    except ValueError:  # digits beyond the base
        pass
    raise ValueError(f"a size or place of a member is {digits!r}, and a whole number is needed")


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "backslashreplace")


def _name(header: bytes) -> str:
    name = _text(header[:100])
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _tidy(name: str) -> str:
    """Leave out what begins a path without saying anything. Raises ValueError for what no file can be called."""
    if len(name) > _LONGEST_NAME:
        raise ValueError(f"the name of a member, {name[:40]}…, is {len(name)} characters long, more than any path is")
    while name.startswith(("./", "/")):
        name = name[1:] if name[0] == "/" else name[2:]
    return name


def _extension(file: BinaryIO, kind: bytes, offset: int, size: int) -> dict[str, str]:
    """Read what stands before a header to extend it: a long name, or PAX's lines `LENGTH KEY=VALUE`."""
    if size > _LONGEST:
        raise ValueError(f"the header at byte {offset} is {size} bytes long, more than any name is")
    file.seek(offset)
    content = file.read(size)
    if kind not in _PAX:
        return {"path" if kind == _LONG_NAME else "linkpath": _text(content)}
    found, at = {}, 0
    while at < len(content) and content[at]:
        digits = content[at : at + 20].partition(b" ")[0]
        length = _whole(digits)
        if length <= len(digits) + 1 or at + length > len(content):
            raise ValueError(f"the header at byte {offset} says that a line of it is {length} bytes long")
        key, _, value = content[at + len(digits) + 1 : at + length - 1].partition(b"=")
        found[key.decode("utf-8", "backslashreplace")] = value.decode("utf-8", "backslashreplace")
        at += length
    return found


# Indexes: `v1.2 COUNT`, then a line for each sample: `ENDING OFFSET SIZE NAME` of each of its members.


def _indexed(file: BinaryIO, end: int, index: Path) -> Iterator[Member]:
    """List the members that an index names, each held against the header that stands before it."""
    lines = read_document(index).decode("utf-8", "backslashreplace").splitlines()
    if not lines or not lines[0].startswith("v1.2"):
        raise ValueError(
            f"an index of version v1.2 is needed, its first line is {lines[0][:20] if lines else 'missing'!r}"
        )
    said = lines[0].split()
    if len(said) != 2 or said[1] != str(len(lines) - 1):
        raise ValueError(f"its first line is {lines[0][:40]!r}, and {len(lines) - 1} lines follow")
    last = 0
    for line in lines[1:]:
        words = line.split()
        if not words or len(words) % 4:
            raise ValueError(f"its line {line[:60]!r} is not ENDING OFFSET SIZE NAME, once or more times")
        for start in range(0, len(words), 4):
            name, offset, size = words[start + 3], _whole(words[start + 1]), _whole(words[start + 2])
            _require_member(file, end, name, offset, size)
            last = max(last, offset + size)
            yield _tidy(name), offset, size, None
    last = -(-last // _BLOCK) * _BLOCK
    file.seek(last)
    if file.read(_BLOCK).strip(b"\0"):
        raise ValueError(f"it lists nothing behind byte {last}, where the archive goes on")


def _require_member(file: BinaryIO, end: int, name: str, offset: int, size: int) -> None:
    if offset < _BLOCK or offset + size > end:
        raise ValueError(f"{name} would lie at bytes {offset} to {offset + size}, and the archive ends at {end}")
    file.seek(offset - _BLOCK)
    header = file.read(_BLOCK)
    if header.startswith(name.encode() + b"\0") and header.startswith(b"%011o" % size, 124):  # as most writers have it
        return
    fits = _name(header) == name
    if not fits:  # a long or foreign name stands before the header, after GNU's manner or PAX's
        whole = name.encode()
        start = max(0, offset - (5 + len(whole) // _BLOCK) * _BLOCK)
        file.seek(start)
        before = file.read(offset - _BLOCK - start)
        fits = whole + b"\0" in before or b" path=" + whole + b"\n" in before
    if not fits or _number(header[124:136]) != size:
        raise ValueError(f"the archive has no member {name} of {size} bytes at byte {offset}")
