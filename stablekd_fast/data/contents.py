"""What encoded images hold, told by a digest of each, which is taken when the image is read anyway and kept beside what
was made of it: stored rows, a checkpoint.

A log of digests is a file of records of 32 bytes, appended as images are first read: so it needs no end, several
processes write to one, and what a crash tears off is not believed. Whoever goes on from such a log compares: an image
whose size and time of change are those of the log is taken for the same, any other is read again, and its digest
decides.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np

from stablekd_fast.data.pixels import BadImage
from stablekd_fast.data.records import Records
from stablekd_fast.errors import DataError
from stablekd_fast.files.owned import open_own

READ_AT_ONCE = 2**28
"""Images of so many bytes in all are read whenever their identity is asked for; larger sets image by image."""
_MOST_AT_ONCE = 100_000
"""Where there are more images, even their sizes are not asked for."""

_RECORD = np.dtype([("sample", "<u4"), ("check", "<u4"), ("digest", "<u8"), ("size", "<i8"), ("changed", "<i8")])
_ODD = np.uint64(0x9E3779B97F4A7C15)
_UNREADABLE = 1
"""The digest of an image that cannot be read; 0 stands for one that was not read yet."""


class Contents:
    """The encoded images of a whole split, and digests of those that were read since somebody wanted digests."""

    def __init__(self, records: Records) -> None:
        self.records = records
        self._digests: np.ndarray | None = None
        self._stamps = np.empty((0, 2), np.int64)
        self._read = np.empty(0, bool)
        """Which images were read in this process since digests are wanted."""
        self._held: dict[int, bytes] = {}
        """What was read for its digest alone, until it is asked for: no file is opened twice for it."""
        self._few: bool | None = None
        """Whether the images are read for their identity; None where nobody asked yet."""
        self._logs: list[BinaryIO] = []

    def read(self, sample: int) -> bytes:
        """Return an encoded image, and note its digest where that is wanted and not known yet.

        Raises BadImage where it cannot be read, and DataError where it is not the image that a log tells of.
        """
        if self._digests is None or self._read[sample]:
            return self._held.pop(sample, None) or self.records.read(sample)
        stamp = self.records.stamp(sample)  # before reading: what changes in between is read again next time
        content = self.records.read(sample)
        if not self._digests[sample] or tuple(self._stamps[sample]) != stamp:
            self._note(sample, _digest(content), stamp)
        self._read[sample] = True
        return content

    def digest_at_once(self) -> bytes | None:
        """Return a digest of all images together, or None if they are too many to be read for it."""
        if self._few is None:
            count = len(self.records)
            self._few = count <= _MOST_AT_ONCE and sum(self.records.stamp(n)[0] for n in range(count)) <= READ_AT_ONCE
        if not self._few:
            return None
        self._want()
        assert self._digests is not None
        for sample in np.flatnonzero(~self._read).tolist():
            try:
                self._held[sample] = self.read(sample)
            except BadImage:
                self._digests[sample] = _UNREADABLE
        return self._digests.tobytes()

    def keep(self, path: Path) -> None:
        """Compare the images with the log at `path`, and append to it what is read from now on.

        Does nothing for images that are all read for their identity. Raises DataError if images are others.
        """
        if self.digest_at_once() is not None:
            return
        self._want()
        assert self._digests is not None
        told = self._take_up(path) if path.exists() else np.zeros(len(self._digests), bool)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            log = open(open_own(path, os.O_WRONLY | os.O_APPEND), "ab", buffering=0)
            log.write(bytes(-log.tell() % _RECORD.itemsize))  # what a full disk tore off is no record
        except OSError as error:
            if not path.exists():  # else it may only be read, as a finished cache may
                warnings.warn(f"{path} cannot be written ({error.strerror}): digests are not kept.", stacklevel=2)
            return
        self._append([log], np.flatnonzero((self._digests != 0) & ~told))
        self._logs.append(log)

    def close(self) -> None:
        """Let go of the logs."""
        while self._logs:
            self._logs.pop().close()

    def _want(self) -> None:
        if self._digests is None:
            count = len(self.records)
            self._digests, self._stamps = np.zeros(count, np.uint64), np.zeros((count, 2), np.int64)
            self._read = np.zeros(count, bool)

    def _note(self, sample: int, digest: int, stamp: tuple[int, int]) -> None:
        assert self._digests is not None
        if self._digests[sample] not in (0, digest):
            raise self._others([sample])
        self._digests[sample], self._stamps[sample] = digest, stamp
        self._append(self._logs, np.array([sample]))

    def _append(self, logs: list[BinaryIO], samples: np.ndarray) -> None:
        assert self._digests is not None
        records = np.zeros(len(samples), _RECORD)
        records["sample"], records["digest"] = samples, self._digests[samples]
        records["size"], records["changed"] = self._stamps[samples].T
        records["check"] = _check(records)
        for log in list(logs):
            try:
                log.write(records.tobytes())  # one write: records of several processes do not mix
            except OSError as error:
                with contextlib.suppress(ValueError):  # another thread was first
                    logs.remove(log)
                warnings.warn(f"{log.name} takes no more digests: {error.strerror}.", stacklevel=2)

    def _take_up(self, path: Path) -> np.ndarray:
        """Take the digests of a log, and return which images it tells of, bool `[N]`, with their present stamps.

        Raises DataError if images are others.
        """
        assert self._digests is not None
        content = path.read_bytes()
        records = np.frombuffer(content[: len(content) // _RECORD.itemsize * _RECORD.itemsize], _RECORD)
        records = records[(records["check"] == _check(records)) & (records["sample"] < len(self.records))]
        told, known = np.zeros(len(self.records), bool), self._digests.copy()
        known[records["sample"][::-1]] = records["digest"][::-1]
        others = known[records["sample"]] != records["digest"]  # two processes met different images
        others = set(records["sample"][others].tolist())
        others |= set(np.flatnonzero((self._digests != 0) & (self._digests != known)).tolist())
        self._digests, told[records["sample"]] = known, True
        self._stamps[records["sample"]] = np.stack([records["size"], records["changed"]], 1)
        samples = np.flatnonzero(told)
        values = (value for sample in samples.tolist() for value in self.records.stamp(sample))
        stamps = np.fromiter(values, np.int64, 2 * len(samples)).reshape(-1, 2)
        changed = samples[(stamps != self._stamps[samples]).any(1)].tolist()
        if len(changed) > len(samples) // 10:
            warnings.warn(
                f"{len(changed)} of {len(samples)} images have another size or time of change than in {path}: they are "
                "read again, to compare what they hold.",
                stacklevel=3,
            )
        others |= {sample for sample in changed if not self._same(sample)}
        if others:
            raise self._others(sorted(others), path)
        told[changed] = False  # their stamps are entered anew
        return told

    def _same(self, sample: int) -> bool:
        try:
            self.read(sample)
        except BadImage:
            return bool(self._digests is not None and self._digests[sample] == _UNREADABLE)
        except DataError:
            return False
        return True

    def _others(self, samples: list[int], path: Path | None = None) -> DataError:
        where = f"{path} was" if path is not None else "rows or a checkpoint were"
        rest = f" and {len(samples) - 1} more" if len(samples) > 1 else ""
        return DataError(
            f"Other images than those that {where} made from: {self.records.name(samples[0])}{rest}. Put the images "
            "back, or begin anew with another --out and another --cache.directory."
        )


def _digest(content: bytes) -> int:
    return max(int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little"), _UNREADABLE + 1)


def _check(records: np.ndarray) -> np.ndarray:
    mixed = records["sample"].astype(np.uint64) * _ODD
    for name in ("digest", "size", "changed"):
        mixed = (mixed ^ records[name].astype(np.uint64)) * _ODD
        mixed ^= mixed >> np.uint64(29)
    return (mixed >> np.uint64(32)).astype(np.uint32)
