"""Data sets by name: where they are looked for, how they are fetched, and what their classes are called."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torchvision import datasets
from torchvision.datasets.utils import download_and_extract_archive

from stablekd_fast.errors import DataError, printable

ROOT_VARIABLE = "STABLEKD_DATA"
"""Environment variable: the folder that holds data sets by name, one folder each."""

_IMAGEWOOF = "https://s3.amazonaws.com/fast-ai-imageclas/imagewoof2-320.tgz"

_NAMES = {
    # Imagenette
    "n01440764": "tench", "n02102040": "English springer", "n02979186": "cassette player", "n03000684": "chain saw",
    "n03028079": "church", "n03394916": "French horn", "n03417042": "garbage truck", "n03425413": "gas pump",
    "n03445777": "golf ball", "n03888257": "parachute",
    # Imagewoof
    "n02086240": "Shih-Tzu", "n02087394": "Rhodesian ridgeback", "n02088364": "beagle", "n02089973": "English foxhound",
    "n02093754": "Border terrier", "n02096294": "Australian terrier", "n02099601": "golden retriever",
    "n02105641": "Old English sheepdog", "n02111889": "Samoyed", "n02115641": "dingo",
}  # fmt: skip

_IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class Preset:
    """How a data set is had: `fetch` downloads it into a folder; it is None where the network has no free copy, and
    `by_hand` says what to do."""

    fetch: Callable[[Path], object] | None
    by_hand: str
    inside: str = ""
    """Where the fetched data lie below their folder."""


PRESETS = {
    "cifar10": Preset(
        lambda folder: datasets.CIFAR10(folder, download=True),
        "fetch cifar-10-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html",
    ),
    "cifar100": Preset(
        lambda folder: datasets.CIFAR100(folder, download=True),
        "fetch cifar-100-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html",
    ),
    "fashion-mnist": Preset(
        lambda folder: [datasets.FashionMNIST(folder, train=train, download=True) for train in (True, False)],
        "fetch the four idx files from https://github.com/zalandoresearch/fashion-mnist",
        "FashionMNIST/raw",
    ),
    "imagenette": Preset(
        lambda folder: datasets.Imagenette(folder, size="320px", download=True),
        "unpack imagenette2-320.tgz from https://github.com/fastai/imagenette",
    ),
    "imagewoof": Preset(
        lambda folder: download_and_extract_archive(_IMAGEWOOF, folder),
        "unpack imagewoof2-320.tgz from https://github.com/fastai/imagenette",
    ),
    "imagenet": Preset(
        None,
        "ask for ILSVRC 2012 at https://www.image-net.org and unpack it to train/CLASS/* and val/CLASS/*, or give "
        "its tars or TFRecords",
    ),
}


def preset_folder(name: str) -> Path:
    """Return the folder of a data set with a known name, fetched if it is not there. Raises DataError with what to do
    by hand."""
    preset = PRESETS[name]
    folder = Path(os.environ.get(ROOT_VARIABLE) or "~/.cache/stablekd_fast/data").expanduser() / name
    if folder.is_dir() and any(folder.iterdir()):
        return folder / preset.inside if (folder / preset.inside).is_dir() else folder
    todo = f"{preset.by_hand}, into {folder} (or set {ROOT_VARIABLE} to the folder that holds {name})"
    if preset.fetch is None:
        raise DataError(f"{name} is not at {folder}, and cannot be fetched without an account; {todo}.")
    part = folder.with_name(f"{name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)  # what an interrupted call left
        part.mkdir(parents=True)
        preset.fetch(part)
        part.rename(folder)  # takes the place of an empty folder, too
    except Exception as error:  # whatever a torn download leads to, beside the network's own errors
        raise DataError(f"{name} is not at {folder}, and fetching it failed ({error}); {todo}.") from error
    return folder / preset.inside


def class_names(folders: list[str]) -> list[str]:
    """Return readable names in place of WordNet numbers, where these are known."""
    if len(folders) == _IMAGENET_CLASSES and all(name[:1] == "n" and name[1:].isdigit() for name in folders):
        from torchvision.models import ResNet18_Weights

        return list(ResNet18_Weights.DEFAULT.meta["categories"])  # in the order of the numbers
    return [_NAMES.get(name, printable(name)) for name in folders]
