"""What all archives are listed as: images, and the class that each says it has."""

from __future__ import annotations

import re
import sys
from typing import NamedTuple

from stablekd_fast.errors import DataError

_LONGEST = 1000
"""A class is named in fewer bytes than this; what is longer is something else."""
_NUMBER = re.compile(r"[+-]?[0-9]{1,18}")


class Sample(NamedTuple):
    """An image inside an archive and the class that it says it has: a number, or a name."""

    name: str
    offset: int
    size: int
    label: int | str
    checked: tuple[int, int] | None = None
    """Offset and size of what holds the image and has its checksum behind it, if anything."""


class NoClass(DataError):
    """None of an archive's images says what it shows."""


def class_of(content: bytes) -> int | str | None:
    """Read a class from text: a whole number, or a name of one line; None where it is empty.

    Raises ValueError, whose text goes on behind the name of what holds the class.
    """
    if len(content) > _LONGEST:
        raise ValueError(f"is {len(content)} bytes long, which is no name of a class")
    try:
        text = content.decode("utf-8-sig").strip().strip("\0")
    except UnicodeDecodeError as error:
        raise ValueError(f"begins with {content[:20]!r}, which is no UTF-8 text") from error
    if len(text.splitlines()) > 1:
        raise ValueError(f"has {len(text.splitlines())} lines, and an image has one class")
    if _NUMBER.fullmatch(text):
        return int(text)
    return sys.intern(text) or None
