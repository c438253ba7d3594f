"""Real image files and archives, written the way that their authors lay them out."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CLASSES = ("ant", "bee", "cat")


def _picture(seed: int, height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def write_tree(tmp_path):
    """Writes an image tree and returns its root: `train` images per class, one third as many for test."""

    def write(size=(12, 12), train=6, suffix="png", test_folder="test", root: Path = tmp_path / "tree") -> Path:
        seed = 0
        for part, count in (("train", train), (test_folder, max(1, train // 3))):
            for name in CLASSES:
                folder = root / part / name
                folder.mkdir(parents=True)
                for number in range(count):
                    _picture(seed, *size).save(folder / f"{number:03d}.{suffix}")
                    seed += 1
        return root

    return write


@pytest.fixture
def write_large_tree(tmp_path):
    """A tree of JPEG files of about 100 pixels, of unequal sizes."""

    def write(train=5) -> Path:
        root = tmp_path / "large"
        seed = 0
        for part, count in (("train", train), ("val", 2)):
            for name in CLASSES:
                folder = root / part / name
                folder.mkdir(parents=True)
                for number in range(count):
                    _picture(seed, 90 + 3 * seed, 120 - 2 * seed).save(folder / f"{number}.JPEG", quality=90)
                    seed += 1
        return root

    return write
