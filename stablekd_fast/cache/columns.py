"""The columns of a run: which of the teacher's outputs are kept, where, and how the rows are opened."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from stablekd_fast.blocks import PairedBlocks
from stablekd_fast.cache.codecs import RowFormat
from stablekd_fast.cache.fingerprint import teacher_fingerprint
from stablekd_fast.cache.manifest import MANIFEST, Manifest
from stablekd_fast.cache.memory_rows import MemoryRows
from stablekd_fast.cache.settings import CacheSettings
from stablekd_fast.cache.store import RowStore
from stablekd_fast.data import TrainSource
from stablekd_fast.errors import CacheFull, ConfigError

TIERS = ("device", "host", "disk")
"""Where rows can be kept: in the memory of the training device, in main memory, on disk."""


@dataclass(frozen=True)
class Kept:
    """Where one output is kept, and by which codec."""

    tier: str
    codec: str


@dataclass(frozen=True)
class Plan:
    """What is kept, by output. Any other output is computed anew, from the images or from a kept output before it."""

    kept: dict[int, Kept] = field(default_factory=dict)

    def plain(self) -> list[list]:
        """The plan as JSON types: `[output, tier, codec]` for each kept output."""
        return [[output, kept.tier, kept.codec] for output, kept in sorted(self.kept.items())]

    @staticmethod
    def from_plain(values: Iterable) -> Plan:
        """The plan that `plain` described."""
        return Plan({output: Kept(tier, codec) for output, tier, codec in values})


@dataclass
class Column:
    """The stored rows of one teacher output."""

    name: str
    format: RowFormat
    rows: RowStore | MemoryRows
    bridged: bool = False
    """Whether a bridge was applied before storing; the teacher cannot go on from such a row."""
    closed: bool = False
    """Whether the column takes no more rows: there was no room for one, or the folder may only be read."""

    @property
    def on_disk(self) -> bool:
        """Whether the rows outlive the run."""
        return isinstance(self.rows, RowStore)

    @property
    def continues(self) -> bool:
        """Whether the teacher can go on from a stored row and give the bits that it gives from the images."""
        return self.format.lossless and not self.bridged


class Columns:
    """Opens the columns of one run, which has one teacher and shows `views` views of one source's samples."""

    def __init__(
        self, paired: PairedBlocks, source: TrainSource, settings: CacheSettings, device: torch.device, views: int
    ) -> None:
        self.paired, self.source, self.settings, self.device = paired, source, settings, device
        self.expected = len(source.split) * views
        self._fingerprints: list[dict] | None = None
        self._room = {tier: settings.budget(tier) or 0 for tier in ("host", "device")}

    def open(self, plan: Plan, examples: dict[int, Tensor]) -> dict[int, Column]:
        """Open the columns that the plan keeps, given an example `[N, ...]` of each output.

        Where a memory has no room for a column, the column stays empty, with a warning: the live teacher serves
        instead, through the same codec. Raises CacheError if a column on disk is damaged or holds rows of something
        else.
        """
        columns = {}
        if any(kept.tier == "disk" for kept in plan.kept.values()):
            keep_digests(self.source, self.settings)
        for output, kept in plan.kept.items():
            try:
                columns[output] = self._open(output, kept, examples[output])
            except CacheFull as error:
                name = output_name(self.paired, output)
                form = row_format(self.paired, output, examples[output], kept.codec)
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
        """A folder for each output, bridge and codec."""
        if self.settings.folder is None:
            return None
        name = re.sub(r"[^\w.]", "_", output_name(self.paired, output))
        bridge = self._fingerprint(output)["bridge"]
        return self.settings.folder / f"{name}{'-' + bridge[:8] if bridge else ''}.{codec}"

    def _manifest(self, output: int, form: RowFormat) -> Manifest:
        layout = {"codec": form.codec, "channels_last": form.channels_last}
        return Manifest(form.parts, self.source.split.total, {**self._fingerprint(output), **layout})

    def _fingerprint(self, output: int) -> dict:
        if self._fingerprints is None:
            self._fingerprints = teacher_fingerprint(self.paired, self.source, self.device)
        return self._fingerprints[output]


def output_name(paired: PairedBlocks, output: int) -> str:
    """The teacher's name for the end of a block; `logits` for the last, or `embedding`."""
    if output < len(paired.cuts):
        return paired.cuts[output].teacher
    return "logits" if paired.head == "classifier" else "embedding"


def row_format(paired: PairedBlocks, output: int, example: Tensor, codec: str) -> RowFormat:
    """How one of the teacher's outputs is stored, given an example of it `[N, ...]`."""
    axis = paired.cuts[output].student_channel_axis if output < len(paired.cuts) else 1
    return RowFormat.of(codec, example, axis)


def open_store(folder: Path, manifest: Manifest, settings: CacheSettings, expected: int) -> RowStore:
    """Open a column's rows as the settings say, for writing where that is allowed; `expected` rows will be put."""
    return RowStore(
        folder,
        manifest,
        write=_may_write(folder),
        budget=settings.budget("disk"),
        verify=settings.verify,
        expected=expected,
    )


def keep_digests(source: TrainSource, settings: CacheSettings) -> None:
    """Compare the images with the digests that lie beside the rows, and add to these what is read from now on.

    Raises DataError if images are others than those that rows were made from.
    """
    if settings.folder is not None:
        source.split.keep_digests(settings.folder / f"images-{source.split.identity()['digest'][:16]}.log")


def _may_write(folder: Path) -> bool:
    """Whether rows can be added; a finished cache may lie where only reading is allowed."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return os.access(existing, os.W_OK)
