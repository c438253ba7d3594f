"""Make the embedded part of Fashion-MNIST anew from the original files:

    python -m stablekd_fast.bench.campaigns.embedded_images FOLDER

FOLDER holds the four idx files, packed or not (Debian's package `dataset-fashion-mnist` has them below
/usr/share/datasets). Takes 500 training images of each class from the 60,000 and 200 test images of each from the
10,000, by a fixed seed, and writes them losslessly into the package. README.md there says how the teacher was made.
"""

from __future__ import annotations

import io
import sys
import zipfile
from pathlib import Path

import numpy as np

from stablekd_fast.data.dataset import FASHION
from stablekd_fast.data.formats.arrays import find_idx, read_idx

SEED = 0
TRAIN_PER_CLASS, TEST_PER_CLASS, CLASSES = 500, 200, 10


def chosen(labels: np.ndarray, per_class: int) -> np.ndarray:
    """The places of `per_class` images of each class, in ascending order."""
    order = np.random.default_rng(SEED).permutation(len(labels))
    picked = [order[labels[order] == label][:per_class] for label in range(CLASSES)]
    return np.sort(np.concatenate(picked))


def make(folder: Path, file: Path = FASHION) -> None:
    """Write the arrays that `read_npz` reads, packed by LZMA."""
    found = find_idx(folder)
    if found is None:
        raise SystemExit(f"{folder} does not hold the four idx files of Fashion-MNIST.")
    arrays = {}
    for part, split, count in zip(("train", "test"), read_idx(found, CLASSES), (TRAIN_PER_CLASS, TEST_PER_CLASS)):
        labels = split.labels.numpy()
        places = chosen(labels, count)
        arrays[f"x_{part}"] = split.images[places][..., 0].numpy()  # gray: the three channels are alike
        arrays[f"y_{part}"] = labels[places].astype(np.uint8)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_LZMA) as packed:
        for name, array in arrays.items():
            content = io.BytesIO()
            np.lib.format.write_array(content, array, allow_pickle=False)
            packed.writestr(zipfile.ZipInfo(f"{name}.npy"), content.getvalue(), zipfile.ZIP_LZMA)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
