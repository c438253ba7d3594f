"""`stablekd bench cache`: rows read in random order, against memory itself, the disk itself, and the usual practice."""

from __future__ import annotations

import mmap
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from stablekd_fast.bench import core
from stablekd_fast.bench.core import (
    SEED,
    Case,
    Contender,
    Measured,
    Timing,
    WrongResult,
    measure_cases,
    pinned,
    scratch,
)
from stablekd_fast.cache.disk import drop_pages
from stablekd_fast.cache.manifest import Manifest
from stablekd_fast.cache.shard import Part
from stablekd_fast.cache.store import READING_THREADS, RowStore
from stablekd_fast.files.sealed import as_bytes

BATCH, _BATCH_BYTES = 128, 16 << 20
ROW_SIZES = (4 << 10, 16 << 10, 64 << 10, 200 << 10)
"""Sizes in bytes, from int8 rows of small images to float32 rows of large ones."""


@dataclass
class Rows:
    """A store whose rows are in memory as well.

    Batches of row numbers, in random order, are taken in turn, as in training: a batch that was just read would come
    out of the processor's caches.
    """

    store: RowStore
    values: Tensor
    batches: Sequence[Tensor]
    out: list[Tensor]
    turn: int = 0

    @staticmethod
    def make(folder: Path, row_bytes: int, total: int) -> Rows:
        count = max(total // row_bytes, 2 * BATCH)
        values = torch.randn(count, row_bytes // 4)
        store = RowStore(folder, Manifest((Part("rows", torch.float32, (row_bytes // 4,)),), count, {}), write=True)
        store.put(torch.arange(count), [values])
        for path in folder.glob("shard-*"):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        order = torch.randperm(count, generator=torch.Generator().manual_seed(SEED))
        batch = max(BATCH, _BATCH_BYTES // row_bytes)
        batches = order[: max(1, count // batch) * batch].split(batch) if count >= batch else [order]
        return Rows(store, values, batches, store.empty(len(batches[0])))

    @property
    def following(self) -> Tensor:
        """The rows that the next call takes."""
        return self.batches[(self.turn + 1) % len(self.batches)]

    def next(self) -> Tensor:
        self.turn += 1
        return self.batches[self.turn % len(self.batches)]

    def gather(self) -> Tensor:
        return self.store.gather(self.next(), self.out)[0]

    def expected(self) -> Tensor:
        return self.values[self.following].double()

    def in_order(self, ahead: int = 0) -> Tensor:
        """Return as many rows side by side, another stretch each time; `ahead` is 1 for those of the next call."""
        size = len(self.batches[0])
        return self.values[(self.turn + ahead) % len(self.batches) * size :][:size]


def page_cache_cases(folder: Path, total: int) -> Iterator[Case]:
    """Read files in main memory. `memcpy` copies as many bytes between two arrays, in order or row by row."""
    for row_bytes in ROW_SIZES:
        place = folder / f"{row_bytes}"
        rows = Rows.make(place, row_bytes, total)
        yield Case(
            "cache",
            f"from main memory, rows of {row_bytes >> 10} KiB",
            _contenders(place, rows, row_bytes),
            "memcpy",
            rows.expected,
            0.0,
            {"bytes": len(rows.batches[0]) * row_bytes, "rows": len(rows.batches[0])},
            "memcpy",
        )
        rows.store.close()
        shutil.rmtree(place)


def _contenders(folder: Path, rows: Rows, row_bytes: int) -> list[Contender]:
    copied = torch.empty_like(rows.out[0])

    def in_order() -> Tensor:
        rows.next()
        return copied.copy_(rows.in_order())

    def row_by_row() -> Tensor:
        return torch.index_select(rows.values, 0, rows.next(), out=copied)

    shard, pool, halves = rows.store._shards[0], ThreadPoolExecutor(2), rows.out[0].tensor_split(2)

    def read() -> Tensor:
        """Read half of the bytes per thread in one call, somewhere in a file: what the system itself gives."""
        rows.next()
        start = shard.starts["rows"] + rows.turn % (shard.rows // len(rows.out[0])) * rows.out[0].nbytes
        offsets = (start, start + halves[0].nbytes)
        list(pool.map(lambda half, offset: os.preadv(shard.file, [as_bytes(half)], offset), halves, offsets))
        return rows.out[0]

    def expected_read() -> Tensor:
        first = (rows.turn + 1) % (shard.rows // len(rows.out[0])) * len(rows.out[0])
        return rows.values[first : first + len(rows.out[0])].double()

    contenders = [
        Contender("memcpy", in_order, "in order", _settle, expected=lambda: rows.in_order(1).double(), role="limit"),
        Contender("memcpy", row_by_row, "row by row", _settle, expected=rows.expected, role="limit"),
        Contender("read() in order", read, prepare=_settle, expected=expected_read, role="limit"),
        Contender("stablekd", rows.gather, prepare=_settle, expected=rows.expected, role="ours"),
    ]
    if row_bytes == 64 << 10:
        wanted = rows.batches[0]
        files = _one_file_per_sample(folder / "pt", rows, wanted)
        contenders.append(
            Contender(
                "one .pt per sample",
                lambda: torch.stack([torch.load(file) for file in files]),
                prepare=_settle,
                expected=lambda: rows.values[wanted].double(),
            )
        )
    return contenders


def _settle() -> None:
    """Wait until OpenMP's threads, which go on spinning for some milliseconds after a loop, have left the cores."""
    time.sleep(0.01)


def _one_file_per_sample(folder: Path, rows: Rows, wanted: Tensor) -> list[Path]:
    folder.mkdir()
    files = [folder / f"{row}.pt" for row in wanted.tolist()]
    for file, row in zip(files, wanted.tolist()):
        torch.save(rows.values[row].clone(), file)
    return files


def disk_rows(folder: Path, total: int, rounds: int) -> list[dict]:
    """Time files that are not in main memory: every timing begins after their pages were dropped.

    The rival reads the same rows past the page cache (O_DIRECT), from as many threads. Raises WrongResult.
    """
    row_bytes = 64 << 10
    rows = Rows.make(folder / "cold", row_bytes, total)
    paths = [shard.path for shard in rows.store._shards]
    direct, read = _direct_reader(rows, row_bytes)
    contenders: dict[str, Callable[[], Tensor]] = {"direct reads": read, "stablekd": rows.gather}
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    shuffle = random.Random(SEED).shuffle
    for number in range(-1, rounds):
        order = list(contenders)
        shuffle(order)
        for name in order:
            expected = rows.values[rows.following]
            for path in paths:
                drop_pages(path)
            start = time.perf_counter()
            found = contenders[name]()
            seconds = time.perf_counter() - start
            if not torch.equal(found, expected):
                raise WrongResult(f"cache, from disk: {name} read other bytes than were written. No speed is shown.")
            if number >= 0:
                taken[name].append(seconds)
    for file in direct:
        os.close(file)
    rows.store.close()
    arms = [Contender(name, call, role="ours" if name == "stablekd" else "limit") for name, call in contenders.items()]
    extras = {"bytes": len(rows.batches[0]) * row_bytes, "rows": len(rows.batches[0])}
    name = f"from disk, rows of {row_bytes >> 10} KiB"
    case = Case("cache", name, arms, "direct reads", rows.expected, 0.0, extras, "direct reads")
    return core.rows(case, [Timing(arm, 1, taken[arm.name]) for arm in arms])


def _direct_reader(rows: Rows, row_bytes: int) -> tuple[list[int], Callable[[], Tensor]]:
    """Return open files, and a function that reads their rows with O_DIRECT in as many threads as the store."""
    files = [os.open(shard.path, os.O_RDONLY | os.O_DIRECT) for shard in rows.store._shards]
    starts = [shard.starts["rows"] for shard in rows.store._shards]
    buffer = mmap.mmap(-1, len(rows.batches[0]) * row_bytes)
    whole, pool = memoryview(buffer), ThreadPoolExecutor(READING_THREADS)
    places = rows.store.tables.places

    def one(job: tuple[int, int]) -> None:
        at, place = job
        shard, slot = place >> 32, place & 0xFFFFFFFF
        os.preadv(files[shard], [whole[at * row_bytes : (at + 1) * row_bytes]], starts[shard] + slot * row_bytes)

    def read() -> Tensor:
        list(pool.map(one, enumerate(places[rows.next()].tolist())))
        return torch.frombuffer(buffer, dtype=torch.float32).view(len(rows.batches[0]), -1)

    return files, read


_EPOCH = """
import os, sys, torch
from pathlib import Path
from stablekd_fast.cache.store import RowStore

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

store = RowStore(Path(sys.argv[1]))
out = store.empty({batch})
store.gather(torch.arange({batch}), out)
before = most = resident()
order = torch.randperm(len(store))
for rows in order.split({batch}):
    if len(rows) == {batch}:
        store.gather(rows, out)
        most = max(most, resident())
print(most - before, len(order) * store.manifest.row_bytes)
"""


def memory_row(folder: Path, total: int) -> dict:
    """Measure how much a process's memory grows while it reads an epoch of `total` bytes in random order."""
    rows = Rows.make(folder / "epoch", 64 << 10, total)
    rows.store.close()
    script = _EPOCH.format(batch=BATCH)
    process = subprocess.run(
        [sys.executable, "-c", script, str(folder / "epoch")], capture_output=True, text=True, check=True
    )
    grown, read = map(int, process.stdout.split())
    return {"bytes_read": read, "resident_growth": grown, "ram_budget": total // 10}


def run_cache(folder: Path, rounds: int, show: Callable[[list[dict]], None], quick: bool = False) -> Measured:
    """Measure all cases, and the growth of memory over an epoch. Leaves nothing in `folder`."""
    total = (32 << 20) if quick else (512 << 20)
    with scratch(folder) as own, pinned() as pins:
        measured = measure_cases(page_cache_cases(own, total), rounds, show)
        measured.take(partial(disk_rows, own, total, rounds), show)
        measured.tables["memory"] = [memory_row(own, (64 << 20) if quick else (2 << 30))]
    measured.settings = {"quick": quick, "reading_threads": READING_THREADS, **pins}
    return measured
