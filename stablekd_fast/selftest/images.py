"""Claims on the sources of images: iterations do not disturb each other, and DALI decodes what Pillow does."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from stablekd_fast.data import Batch, TrainSource, open_dataset
from stablekd_fast.data.dali import dali_missing
from stablekd_fast.selftest.claim import Broken, Claim, NotHere

APART = 0.08
"""How far DALI's pixels may be from Pillow's, root mean square in standard deviations of ImageNet: 35 dB."""
_STEPS = 4


@contextmanager
def _photographs() -> Iterator[Path]:
    """Make a folder of JPEGs, smooth as photographs are."""
    with tempfile.TemporaryDirectory() as folder:
        for part, count in (("train", 12), ("test", 1)):
            (Path(folder) / part / "a").mkdir(parents=True)
            for number in range(count):
                small = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
                size = 300 - 5 * number, 240 + 9 * number
                picture = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
                picture.save(Path(folder) / part / "a" / f"{number}.jpg", quality=92)
        yield Path(folder)


def _source(path: Path | str, device: torch.device, name: str) -> TrainSource:
    dataset = open_dataset(path)
    return TrainSource(
        dataset.train, dataset.augmentation, dataset.mean, dataset.std, batch_size=4, seed=0, workers=2, source=name,
        device=device,
    )  # fmt: skip


def _interleaved(device: torch.device) -> str:
    """Walk through a source twice at once, as training and an evaluation in its midst do."""
    with _photographs() as folder:
        checked = []
        for path, name in (("digits", "resident"), (folder, "torchvision"), (folder, "dali")):
            if name == "dali" and dali_missing():
                continue
            alone = list(_source(path, device, name).batches(0, _STEPS))
            source = _source(path, device, name)
            training = source.batches(0, _STEPS)
            for number, batch in enumerate(training):
                _same(name, batch, alone[number])
                for looked_at, expected in zip(source.batches(0, 2), alone):
                    _same(name, looked_at, expected)
            checked.append(name)
    return f"{', '.join(checked)}: the same bits"


def _same(name: str, one: Batch, other: Batch) -> None:
    if not (torch.equal(one.sample_ids, other.sample_ids) and torch.equal(one.pixels, other.pixels)):
        raise Broken(f"{name} gives other images while somebody else reads from it")


def _dali_decodes(device: torch.device) -> str:
    missing = dali_missing()
    if missing:
        raise NotHere(missing)
    with _photographs() as folder:
        theirs = list(_source(folder, torch.device("cpu"), "torchvision").batches(0, _STEPS))
        ours = list(_source(folder, device, "dali").batches(0, _STEPS))
    apart = max((a.pixels.cpu() - b.pixels).square().mean().sqrt().item() for a, b in zip(ours, theirs, strict=True))
    if not apart <= APART:
        raise Broken(f"pixels are {apart:.3f} standard deviations apart; at most {APART} is allowed")
    return f"{apart:.3f} of at most {APART} standard deviations apart, on {device.type}"


IMAGES = [
    Claim("a source may be read twice at once", _interleaved, "with the batches of a source read once"),
    Claim("DALI decodes what Pillow does", _dali_decodes, "with torchvision's source on the CPU"),
]
