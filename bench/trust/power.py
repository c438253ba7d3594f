"""What a loss of power may leave of a run: every prefix of its calls, without or with parts of what was not flushed."""

from __future__ import annotations

import dataclasses
import random
import shutil
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from stablekd_fast.bench.trust.calls import Trouble
from stablekd_fast.bench.trust.runs import Runs, rows_in
from stablekd_fast.cache.maintain import columns_in
from stablekd_fast.cache.store import RowStore
from stablekd_fast.engine.checkpoint import load_tensors
from stablekd_fast.errors import StableKDError
from stablekd_fast.report import read_results
from stablekd_fast.report.events import read_events

SECTOR = 512
"""A write is torn between sectors."""


@dataclasses.dataclass(frozen=True)
class Call:
    """One record of `calls.c`."""

    kind: str
    node: int
    offset: int
    first: bytes
    second: bytes


@dataclasses.dataclass
class File:
    """A file's bytes that are on the disk, and what was done to it since it was flushed."""

    durable: bytearray = dataclasses.field(default_factory=bytearray)
    pending: list[tuple[int, bytes | None]] = dataclasses.field(default_factory=list)
    """Writes `(offset, bytes)`, and sizes `(size, None)`."""


class Disk:
    """The files of a run as the calls made them, of which a crash keeps what was flushed and some of the rest."""

    def __init__(self) -> None:
        self.files: dict[int, File] = {}
        self.names: dict[str, int] = {}
        self.changes: dict[str, list[tuple[str, str, int]]] = {}
        """By folder, names that were made, moved (`old` is the name that goes) or removed since it was flushed."""
        self._now: dict[str, int] = {}

    def apply(self, call: Call) -> None:
        """Take in one call."""
        path, other = ("", "") if call.kind in "wa" else (call.first.decode(), call.second.decode())
        if call.kind == "o":
            self.files[call.node] = File()
            self._change(path, "", call.node)
        elif call.kind == "w":
            self.files.setdefault(call.node, File()).pending.append((call.offset, call.first))
        elif call.kind == "a":
            self.files.setdefault(call.node, File()).pending.append((call.offset, None))
        elif call.kind == "r":
            self._change(other, path, self._now[path])
        elif call.kind == "u" and path in self._now:
            self._change("", path, 0)
        elif call.kind == "s" and call.node in self.files:
            file = self.files[call.node]
            file.durable, file.pending = _written(file, file.pending), []
        elif call.kind == "s":
            for change in self.changes.pop(path, []):
                _rename(self.names, change)

    def _change(self, new: str, old: str, node: int) -> None:
        folder = str(Path(new or old).parent)
        self.changes.setdefault(folder, []).append((new, old, node))
        _rename(self._now, (new, old, node))

    def crashed(self, draw: random.Random) -> dict[str, bytes]:
        """What may be there afterwards: names in the order of their making up to somewhere, any of the writes."""
        names = dict(self.names)
        for changes in self.changes.values():
            for change in changes[: draw.randint(0, len(changes))]:
                _rename(names, change)
        kept = {}
        for node in set(names.values()):
            file, how = self.files[node], draw.random()
            some = [_torn(one, draw) for one in file.pending if how < 0.3 or draw.random() < how]
            kept[node] = bytes(_written(file, some))
        return {path: kept[node] for path, node in names.items()}


def _rename(names: dict[str, int], change: tuple[str, str, int]) -> None:
    new, old, node = change
    names.pop(old, None)
    if new:
        names[new] = node


def _torn(write: tuple[int, bytes | None], draw: random.Random) -> tuple[int, bytes | None]:
    offset, data = write
    if data is None or len(data) < 2 or draw.random() < 0.7:
        return write
    end = offset + draw.randint(1, len(data) - 1)
    end -= end % SECTOR if end - end % SECTOR > offset else 0
    return offset, data[: end - offset]


def _written(file: File, writes: list[tuple[int, bytes | None]]) -> bytearray:
    content = bytearray(file.durable)
    for offset, data in writes:
        size = offset + len(data) if data is not None else offset
        if len(content) < size:
            content.extend(bytes(size - len(content)))
        if data is None and offset == 0:
            content.clear()
        elif data is not None:
            content[offset:size] = data
    return content


def calls_in(log: Path) -> list[Call]:
    """The calls of a run, in their order."""
    data, at, found = log.read_bytes(), 0, []
    while at < len(data):
        kind, node, offset, one, two = struct.unpack_from("<QQqQQ", data, at)
        at += 40
        found.append(Call(chr(kind), node, offset, data[at : at + one], data[at + one : at + one + two]))
        at += one + two
    return found


def power_loss(folder: Path, first: int, count: int) -> Iterator[list[str]]:
    """Open `count` states that a crash may leave. Yields the faults of each state from the one numbered `first` on."""
    runs = Runs(folder / "run", cached=True)
    runs.clear()
    runs.run(Trouble(log=str(folder / "calls.log")))
    truth = _Truth(runs, calls := calls_in(folder / "calls.log"))
    runs.close()
    each = -(-count // len(calls))
    disk, state = Disk(), folder / "state"
    for number, call in enumerate(calls):
        disk.apply(call)
        for variant in range(each):
            if number * each + variant < first:
                continue
            shutil.rmtree(state, ignore_errors=True)
            for path, content in disk.crashed(random.Random(f"{number} {variant}")).items():
                target = state / Path(path).relative_to(runs.folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)
            yield [f"after call {number} of {len(calls)}, variant {variant}: {fault}" for fault in truth.faults(state)]


class _Truth:
    """What was ever whole in the run, to compare with what a crash left."""

    def __init__(self, runs: Runs, calls: list[Call]) -> None:
        self.rows = {}
        for column in columns_in(runs.cache):
            with RowStore(column) as store:
                numbers, parts = rows_in(store)
                self.rows[column.name] = dict(zip(numbers.tolist(), zip(*parts)))
        self.saved = {call.first for call in calls if call.kind == "w" and len(call.first) > 200}
        """All that was written as a whole: checkpoints and students are."""

    def faults(self, state: Path) -> list[str]:
        """What is there and wrong; what is refused is not."""
        out, found = state / "out", []
        for name in ("checkpoint", "student"):
            path = out / f"{name}.safetensors"
            if path.exists() and _readable(lambda path=path: load_tensors(path)) is not None:
                if path.read_bytes() not in self.saved:
                    found.append(f"{path.name} is taken for whole and is not what was ever written")
        if (out / "results.json").exists():
            _readable(lambda: read_results(out / "results.json"))
        if (out / "events.jsonl").exists():
            _readable(lambda: read_events(out))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for column in sorted((state / "cache").glob("*/")):
                found += _readable(lambda column=column: self._other_rows(column)) or []
        return found

    def _other_rows(self, column: Path) -> list[str]:
        with RowStore(column, write=True) as store:
            numbers, parts = rows_in(store)
            for number, row in zip(numbers.tolist(), zip(*parts)):
                if not _same(row, self.rows[column.name].get(number)):
                    return [f"row {number} of {column.name} is served and was never written"]
        return []


def _same(row: tuple[Tensor, ...], other: tuple[Tensor, ...] | None) -> bool:
    return other is not None and all(map(torch.equal, row, other))


def _readable(read):
    """What a reader gives; None where it refuses in a sentence of its own."""
    try:
        return read()
    except StableKDError:
        return None
