"""The columns of a run, opened as its plan says."""

from __future__ import annotations

import os
import re
import threading
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from stablekd_fast.blocks import PairedBlocks
from stablekd_fast.cache.codecs import RowFormat
from stablekd_fast.cache.fingerprint import image_fingerprint, teacher_fingerprint
from stablekd_fast.cache.manifest import MANIFEST, Manifest
from stablekd_fast.cache.memory import MemoryRows
from stablekd_fast.cache.settings import CacheSettings, parse_bytes
from stablekd_fast.cache.shard import Part
from stablekd_fast.cache.store import RowStore
from stablekd_fast.data import TrainSource
from stablekd_fast.errors import CacheFull, ConfigError


@dataclass
class Column:
    """The stored rows of one teacher output."""

    name: str
    format: RowFormat
    rows: RowStore | MemoryRows
    bridged: bool = False
    """Whether a bridge was applied before storing; the teacher cannot go on from such a row."""
    closed: bool = False
    """No more rows are put: there was no room for one."""

    @property
    def on_disk(self) -> bool:
        return isinstance(self.rows, RowStore)

    @property
    def continues(self) -> bool:
        """Whether the teacher can go on from a stored row and give the bits that it gives from the images."""
        return self.format.lossless and not self.bridged


@dataclass(frozen=True)
class Kept:
    """Where one output is kept, and by which codec."""

    tier: str
    codec: str


@dataclass(frozen=True)
class Plan:
    """What is kept, by output. What is left out is relayed, or computed again from a kept output before it."""

    kept: dict[int, Kept] = field(default_factory=dict)

    def plain(self) -> list:
        """For JSON."""
        return [[output, kept.tier, kept.codec] for output, kept in sorted(self.kept.items())]

    @staticmethod
    def from_plain(values: Iterable) -> Plan:
        return Plan({output: Kept(tier, codec) for output, tier, codec in values})


def output_name(paired: PairedBlocks, output: int) -> str:
    return paired.cuts[output].teacher if output < len(paired.cuts) else "logits"


def row_format(paired: PairedBlocks, output: int, example: Tensor, codec: str) -> RowFormat:
    """How one of the teacher's outputs is stored, given an example of it `[N, ...]`."""
    axis = paired.cuts[output].student_channel_axis if output < len(paired.cuts) else 1
    return RowFormat.of(codec, example, axis)


class Columns:
    """Opens columns for one run: one teacher, one source of views.

    `views`: how many the run will show.
    """

    def __init__(
        self, paired: PairedBlocks, source: TrainSource, settings: CacheSettings, device: torch.device, views: int
    ) -> None:
        self.paired, self.source, self.settings, self.device = paired, source, settings, device
        self.expected = len(source.split) * views
        self._fingerprints: list[dict] | None = None
        self._room = {
            tier: parse_bytes(getattr(settings, f"{tier}_budget"), f"cache.{tier}_budget")
            for tier in ("host", "device")
        }

    def open(self, plan: Plan, examples: dict[int, Tensor]) -> dict[int, Column]:
        """The columns that the plan keeps. One for which a memory has no room holds nothing, with a warning: the live
        teacher serves instead, through the same codec.

        Raises CacheError if a column on disk holds rows of something else, or is damaged.
        """
        columns = {}
        for output, kept in plan.kept.items():
            try:
                columns[output] = self._open(output, kept, examples[output])
            except CacheFull as error:
                name, form = (
                    output_name(self.paired, output),
                    row_format(self.paired, output, examples[output], kept.codec),
                )
                columns[output] = Column(name, form, MemoryRows(form.parts, 0, torch.device("cpu")), closed=True)
                warnings.warn(
                    f"{name} is not cached, the live teacher serves instead: {error}", RuntimeWarning, stacklevel=2
                )
        return columns

    def stored_rows(self, output: int, example: Tensor, codec: str) -> int:
        """How many rows a column on disk has already; 0 if there is none."""
        wanted = self._manifest(output, row_format(self.paired, output, example, codec))
        folder = self._folder(output, codec)
        if folder is None or not (folder / MANIFEST).exists():
            return 0
        with RowStore(folder, wanted, write=_may_write(folder)) as store:
            return len(store)

    def _open(self, output: int, kept: Kept, example: Tensor) -> Column:
        form = row_format(self.paired, output, example, kept.codec)
        name = f"{output_name(self.paired, output)} ({kept.codec}, {kept.tier})"
        bridged = self.paired.bridge_after(output) is not None
        if kept.tier != "disk":
            memory = self.device if kept.tier == "device" else torch.device("cpu")
            self._take_room(kept.tier, self.expected * form.row_bytes)
            return Column(name, form, MemoryRows(form.parts, self.expected, memory), bridged)
        folder = self._folder(output, kept.codec)
        if folder is None:
            raise ConfigError("This run keeps rows on disk; resume it with the same --cache.directory.")
        store = open_store(folder, self._manifest(output, form), self.settings, self.expected)
        return Column(name, form, store, bridged, closed=not store.write)

    def _take_room(self, tier: str, size: int) -> None:
        if size > self._room[tier]:
            raise CacheFull(
                f"{size} bytes of rows do not fit into the {self._room[tier]} bytes that are left of "
                f"cache.{tier}_budget."
            )
        self._room[tier] -= size

    def _folder(self, output: int, codec: str) -> Path | None:
        if self.settings.directory is None:
            return None
        name = re.sub(r"[^\w.]", "_", output_name(self.paired, output))
        bridge = self._fingerprint(output)["bridge"]
        return Path(self.settings.directory).expanduser() / f"{name}{'-' + bridge[:8] if bridge else ''}.{codec}"

    def _manifest(self, output: int, form: RowFormat) -> Manifest:
        layout = {"codec": form.codec, "channels_last": form.channels_last}
        return Manifest(form.parts, self.source.split.total, {**self._fingerprint(output), **layout})

    def _fingerprint(self, output: int) -> dict:
        if self._fingerprints is None:
            self._fingerprints = teacher_fingerprint(self.paired, self.source, self.device)
        return self._fingerprints[output]


def open_store(folder: Path, manifest: Manifest, settings: CacheSettings, expected: int) -> RowStore:
    budget = None if settings.disk_budget is None else parse_bytes(settings.disk_budget, "cache.disk_budget")
    return RowStore(
        folder,
        manifest,
        write=_may_write(folder),
        budget=budget,
        verify=settings.verify,
        expected=expected,
    )


def _may_write(folder: Path) -> bool:
    """Whether rows can be added; a finished cache may lie where only reading is allowed."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return os.access(existing, os.W_OK)


class ImageColumn:
    """Decoded views on disk, for a `TrainSource`. Where a row cannot be stored it is decoded again next time."""

    def __init__(self, source: TrainSource, settings: CacheSettings, views: int) -> None:
        size = source.augmentation.size
        manifest = Manifest(
            (Part("images", torch.uint8, (size, size, 3)),), source.split.total, image_fingerprint(source)
        )
        folder = Path(settings.directory).expanduser() / "images.uint8"
        self.store = open_store(folder, manifest, settings, len(source.split) * views)
        self._mutex, self._closed = threading.Lock(), not self.store.write

    def get(self, sample: int, view: int) -> Tensor | None:
        row = torch.tensor([view * self.store.manifest.samples + sample])
        if not bool(self.store.present(row)):
            return None
        return self.store.gather(row)[0][0]

    def put(self, sample: int, view: int, image: Tensor) -> None:
        row = torch.tensor([view * self.store.manifest.samples + sample])
        with self._mutex:
            if self._closed:
                return
            try:
                self.store.put(row, [image.contiguous()[None]])
            except CacheFull as error:
                self._closed = True
                warnings.warn(f"Images are cached no further: {error}", RuntimeWarning, stacklevel=2)

    def refresh(self) -> None:
        """Take up what other processes have stored since."""
        self.store.refresh()

    def close(self) -> None:
        self.store.close()


TIERS = ("device", "host", "disk")
