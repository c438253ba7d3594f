"""Real image files and archives, written the way that their authors lay them out."""

import os
import resource
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CLASSES = ("ant", "bee", "cat")
MEGABYTES = 400
"""So much more memory than before no reader may take, whatever a file announces."""


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


@pytest.fixture
def picture():
    """Makes pictures that are smooth, as photographs are: a few random colours blown up."""
    return _smooth


def _smooth(seed: int, height: int, width: int) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def strange_tree(tmp_path, picture):
    """Two classes of pictures, among them whatever users' folders hold; and how many cannot be used."""
    for part in ("train", "test"):
        for label in ("a", "b"):
            (tmp_path / part / label).mkdir(parents=True)
            for k in range(6):
                picture(k, 90 + 7 * k, 130 - 5 * k).save(tmp_path / part / label / f"plain{k}.jpg", quality=92)
    folder = tmp_path / "train" / "b"
    whole = (folder / "plain0.jpg").read_bytes()
    picture(10, 80, 100).convert("CMYK").save(folder / "cmyk.jpg")
    picture(11, 80, 100).convert("L").save(folder / "gray.jpg")
    picture(12, 80, 100).save(folder / "progressive.jpg", progressive=True)
    picture(13, 80, 100).save(folder / "png.png")
    Image.fromarray((np.arange(8000, dtype=np.uint16) * 8).reshape(80, 100)).save(folder / "deep.png")
    for orientation in (1, 3, 6, 8):
        exif = Image.Exif()
        exif[0x0112] = orientation
        picture(14, 80, 120).save(folder / f"turned{orientation}.jpg", exif=exif)
    picture(15, 40, 20_000).save(folder / "wide.jpg")
    picture(16, 1, 1).save(folder / "dot.jpg")
    (folder / "tail.jpg").write_bytes(whole + b"behind the end")
    (folder / "long_tail.jpg").write_bytes(whole + bytes(5000))
    holes = bytearray(whole)
    holes[len(holes) // 2 : len(holes) // 2 + 40] = bytes(40)
    (folder / "holes.jpg").write_bytes(holes)
    bad = {"empty.jpg": b"", "text.jpg": b"no picture", "cut.jpg": whole[: len(whole) // 2], "head.jpg": whole[:300]}
    for name, content in bad.items():
        (folder / name).write_bytes(content)
    return tmp_path, sorted(bad)


@pytest.fixture
def little_memory():
    """Refuse memory beyond what the process has now and a little more."""
    now = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + (MEGABYTES << 20), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)
