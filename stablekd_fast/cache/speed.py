"""How fast codecs and tiers are on this machine, measured on the run's own rows."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stablekd_fast.cache.codecs import RowFormat
from stablekd_fast.cache.disk import SUFFIX, drop_pages
from stablekd_fast.cache.manifest import Manifest
from stablekd_fast.cache.memory_rows import MemoryRows
from stablekd_fast.cache.settings import CacheSettings
from stablekd_fast.cache.store import RowStore
from stablekd_fast.execution.process import spare_processors
from stablekd_fast.execution.timing import REPEATS, seconds, timed

_PROBE_BYTES = 48 << 20
_PAGE_CACHE_FRACTION = 0.6
"""The fraction of the memory that is free now which the system can be expected to use for files."""


@dataclass(frozen=True)
class CodecCost:
    """What a codec takes for one output."""

    row_bytes: int
    encode: float
    """Seconds for a batch."""
    decode: float
    """Seconds for a batch."""
    stored: float = 0.0
    """The fraction of the rows that are on disk already."""
    exact: bool = True
    """Whether rows decode to the very bits that were encoded."""


@dataclass(frozen=True)
class TierCost:
    """What it takes to read and to write rows in a tier."""

    read: Mapping[str, float]
    """Seconds per byte on each resource that is used: `device`, `link` or `disk`."""
    write: Mapping[str, float]
    """Seconds per byte on each resource that is used."""
    budget: float
    """Bytes that the rows may take."""


def measure_codec(form: RowFormat, example: Tensor, stored: float = 0.0) -> CodecCost:
    """Time how a batch `example` `[N, ...]` is encoded and decoded on its device."""
    parts = form.encode(example)
    return CodecCost(
        form.row_bytes,
        seconds(lambda: form.encode(example), example.device),
        seconds(lambda: form.decode(parts), example.device),
        stored,
        form.lossless,
    )


def measure_tiers(
    settings: CacheSettings, example: Tensor, working_set: int, device: torch.device
) -> dict[str, TierCost]:
    """Time the tiers that the settings allow, with rows like those of `example` `[N, ...]`.

    `working_set` is how many bytes will be read again and again: if they fit into free main memory, files are read from
    there.
    """
    form = RowFormat.of("fp32", example)
    count = max(len(example), _PROBE_BYTES // form.row_bytes)
    rows = torch.arange(count)
    parts = [
        part.cpu().repeat(-(-count // len(part)), *[1] * (part.dim() - 1))[:count].contiguous()
        for part in form.encode(example)
    ]
    tiers = {}
    for tier, memory in (("device", device), ("host", torch.device("cpu"))):
        budget = settings.budget(tier)
        if budget and not (tier == "device" and device.type == "cpu"):
            tiers[tier] = TierCost(*_memory_rates(form, rows, parts, len(example), memory, device), budget)
    if settings.folder is not None:
        tiers["disk"] = _disk(settings, form, rows, parts, len(example), working_set, device)
    return tiers


def _memory_rates(
    form: RowFormat, rows: Tensor, parts: list[Tensor], batch: int, memory: torch.device, device: torch.device
) -> tuple[dict, dict]:
    store = MemoryRows(form.parts, len(rows), memory)
    write = timed(lambda: store.put(rows, parts), memory)[1] / (len(rows) * form.row_bytes)
    batches = iter(torch.randperm(len(rows)).repeat(REPEATS + 1).split(batch))
    read = seconds(lambda: [part.to(device) for part in store.gather(next(batches))], device) / (batch * form.row_bytes)
    resource = "device" if memory == device else "link"
    return {resource: read}, {resource: write}


def _disk(
    settings: CacheSettings,
    form: RowFormat,
    rows: Tensor,
    parts: list[Tensor],
    batch: int,
    working_set: int,
    device: torch.device,
) -> TierCost:
    """Reading costs the disk its time where the rows do not stay in main memory, and a CPU that trains a copy where it
    has no processor to spare. What is written a GPU first hands over, and makes nothing ready meanwhile."""
    directory = settings.folder
    assert directory is not None
    probe, size = directory / f".probe-{os.getpid()}", len(rows) * form.row_bytes
    try:
        with RowStore(probe / "rows", Manifest(form.parts, len(rows), {}), write=True) as store:
            start = time.perf_counter()
            store.put(rows, parts)
            write = (time.perf_counter() - start) / size
            out = store.empty(batch)
            batches = iter(torch.randperm(len(rows)).repeat(2 * REPEATS + 2).split(batch))
            cached = seconds(lambda: store.gather(next(batches), out), torch.device("cpu")) / (batch * form.row_bytes)
            for shard in (probe / "rows").glob(f"*{SUFFIX}"):
                drop_pages(shard)
            start = time.perf_counter()
            store.gather(torch.randperm(len(rows))[: len(rows) // 2])
            cold = (time.perf_counter() - start) / (len(rows) // 2 * form.row_bytes)
    finally:
        shutil.rmtree(probe, ignore_errors=True)
    stays = working_set < _PAGE_CACHE_FRACTION * free_memory()
    read, budget = {"disk": cached if stays else cold}, _disk_budget(directory, settings.budget("disk"))
    if device.type == "cpu":
        return TierCost(read if spare_processors() else {**read, "device": cached}, {"device": write}, budget)
    staged = torch.empty(8 << 20, pin_memory=True)
    link = seconds(lambda: staged.to(device, non_blocking=True), device) / (staged.numel() * 4)
    return TierCost({**read, "link": link}, {"link": link + write}, budget)


def _disk_budget(directory: Path, budget: int | None) -> float:
    """What all rows may take, those that are stored already among them."""
    held = sum(path.stat().st_size for path in directory.rglob(f"*{SUFFIX}"))
    free = 0.95 * shutil.disk_usage(directory).free + held
    return free if budget is None else min(free, budget)


def free_memory() -> int:
    """Bytes of main memory that are free or hold nothing but files."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") + _file_pages()


def _file_pages() -> int:
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["Cached"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 0
