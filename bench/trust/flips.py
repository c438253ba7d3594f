"""Every byte of what a run writes is flipped once: it is named, or without effect."""

from __future__ import annotations

import itertools
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from stablekd_fast.bench.trust.runs import rows_in
from stablekd_fast.cache import CacheSettings
from stablekd_fast.cache.maintain import columns_in
from stablekd_fast.cache.store import RowStore
from stablekd_fast.config import DistillConfig
from stablekd_fast.engine.checkpoint import load_tensors
from stablekd_fast.errors import StableKDError
from stablekd_fast.models.weights import card_of, load_weights
from stablekd_fast.run.distiller import Distiller


def small_network(seed: int) -> nn.Module:
    """A network of two blocks for images of three channels."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)),
    )


def flips(folder: Path, first: int, every: int = 1) -> Iterator[list[str]]:
    """Flip a bit of each `every`-th byte of a checkpoint, an exported student, a manifest and a shard. Yields the
    faults of each flip from the one numbered `first` on."""
    shutil.rmtree(folder, ignore_errors=True)
    config = DistillConfig(
        data="digits", method="blocks", cuts=["0"], epochs=2.0, subset=64, validation=0, batch_size=16, views=1,
        bn_images=16, precision="fp32", device="cpu", out=str(folder / "out"),
        cache=CacheSettings(plan="all", directory=str(folder / "cache")),
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Distiller(config, teacher=small_network(0), student=small_network(1)).run(progress=False)
        column = next(path for path in columns_in(folder / "cache") if path.name.startswith("logits"))
        shard = next(column.glob("shard-*"))
        manifest, files = column / "manifest.json", folder / "out"
        tried = itertools.chain(
            _flipped(files / "checkpoint.safetensors", _tensors, every),
            _flipped(files / "student.safetensors", _student, every),
            _flipped(manifest, lambda path: _rows(path.parent), every),
            _flipped(shard, lambda path: _rows(path.parent), every),
        )
        yield from itertools.islice(tried, first, None)


def _flipped(path: Path, read: Callable[[Path], list], every: int) -> Iterator[list[str]]:
    content, whole = path.read_bytes(), read(path)
    for at in range(0, len(content), every):
        path.write_bytes(content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :])
        try:
            faults = [] if _equal(read(path), whole) else ["it is read, and is not what was written"]
        except StableKDError as error:
            faults = [] if str(path.parent) in str(error) else [f"the message does not name the file: {error}"]
        yield [f"byte {at} of {path.name}: {fault}" for fault in faults]
    path.write_bytes(content)


def _tensors(path: Path) -> list:
    tensors, metadata = load_tensors(path)
    return [metadata, *sorted(tensors.items())]


def _student(path: Path) -> list:
    model = small_network(2)
    load_weights(model, path)
    return [card_of(path), *sorted(model.state_dict().items())]


def _rows(folder: Path) -> list:
    with RowStore(folder) as store:
        numbers, parts = rows_in(store)
        return [("numbers", numbers), *(("rows", part) for part in parts)]


def _equal(one: list, other: list) -> bool:
    if len(one) != len(other):
        return False
    return all(a[0] == b[0] and torch.equal(a[1], b[1]) if isinstance(a, tuple) else a == b for a, b in zip(one, other))
