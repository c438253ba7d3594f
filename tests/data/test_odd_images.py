"""Odd image files give the same picture from every source, or are named."""

import io
import tarfile
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from stablekd_fast.data import EvalSource, TrainSource, open_dataset
from stablekd_fast.data.pixels import BadImage, decode_rgb, read_header
from tests.data.odd_images import HEIGHT, TURNED, WIDTH, scene, write_odd_images

GRAY = ("l.", "la.", "1.", "gray")
FEW_COLOURS = {"p.": 8, "palette": 8, "animated": 6, "1.": 12}
"""How many levels such files are away from what they show, on average, as they hold few colours."""
JPEG_LEVELS = 2.0
"""A JPEG of this quality is within so many levels on average, of every decoder."""


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    root = tmp_path_factory.mktemp("odd")
    usable = write_odd_images(root / "train" / "odd")
    for part, name in (("train", "plain"), ("test", "odd"), ("test", "plain")):
        (root / part / name).mkdir(parents=True)
        for number in range(2):
            Image.fromarray(scene()).save(root / part / name / f"{number}.png")
    return root, usable


def orientation_of(name: str) -> int:
    number = int(name.partition(".")[0][-1]) if name.startswith(("exif", "xmp")) else 6 if name == "turned.tiff" else 1
    return number if 1 <= number <= 8 else 1


def expected(name: str) -> np.ndarray:
    """The scene, turned as the file says, and gray where it holds no colours."""
    upright = {
        1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a, -1), 7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a),
    }[orientation_of(name)](scene())  # fmt: skip
    if name.startswith("gray"):
        return np.repeat(upright[:, :, :1], 3, 2)
    if name.startswith(GRAY):
        return np.repeat(np.asarray(Image.fromarray(np.ascontiguousarray(upright)).convert("L"))[:, :, None], 3, 2)
    return upright


def coarse(pixels: np.ndarray) -> np.ndarray:
    """Means over squares of 8 x 8, so that dots of black and white are gray."""
    height, width = pixels.shape[:2]
    return pixels.reshape(height // 8, 8, width // 8, 8, 3).mean((1, 3))


def test_every_file_is_decoded_upright_or_named(odd):
    root, usable = odd
    assert len(usable) >= 60
    for name, good in usable.items():
        path = root / "train" / "odd" / name
        if not good:
            with pytest.raises(BadImage, match=name):
                read_header(path.read_bytes(), path)
                decode_rgb(path.read_bytes(), path)
            continue
        header, pixels = read_header(path.read_bytes(), path), decode_rgb(path.read_bytes(), path)
        wanted = (WIDTH, HEIGHT) if orientation_of(name) in TURNED else (HEIGHT, WIDTH)
        assert (header.height, header.width) == tuple(pixels.shape[:2]) == wanted, name
        if name != "damaged_middle.jpg":
            away = np.abs(coarse(pixels.numpy()) - coarse(expected(name))).mean()
            bound = next((levels for start, levels in FEW_COLOURS.items() if name.startswith(start)), JPEG_LEVELS)
            assert away <= bound, (name, away)


def views_of(root, source, names):
    """One view of every usable image by name, uint8, and which names were left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = open_dataset(root, image_size=65, on_bad_image="skip")
    no_change = (0.0,) * 3, (1 / 255,) * 3
    train = TrainSource(dataset.train, dataset.augmentation, *no_change, batch_size=8, seed=3, source=source, workers=2)
    found = {}
    for batch in train.whole_view(5):
        for sample, image in zip(batch.sample_ids.tolist(), batch.pixels):
            found[dataset.train.records.name(sample).name] = image.round().to(torch.uint8)
    return {name: found[name] for name in names if name in found}, {path.name for path, _ in dataset.train.skipped}


@pytest.mark.dali
def test_sources_agree_on_odd_files(odd):
    root, usable = odd
    bad = {name for name, good in usable.items() if not good}
    ours, left_out = views_of(root, "torchvision", usable)
    theirs, theirs_left_out = views_of(root, "dali", usable)
    assert left_out == theirs_left_out == bad and ours.keys() == theirs.keys() == usable.keys() - bad
    for name, image in ours.items():
        apart = (image.int() - theirs[name].int()).abs()
        path = root / "train" / "odd" / name
        if not read_header(path.read_bytes(), path).plain:
            assert apart.max() == 0, f"{name} is decoded by Pillow for both"
        elif name != "damaged_middle.jpg":
            assert apart.float().mean() <= 1 and apart.max() <= 8, (name, apart.float().mean(), apart.max())


def test_evaluation_and_archives_see_what_folders_see(odd, tmp_path):
    root, usable = odd
    ours, _ = views_of(root, "torchvision", usable)
    for part in ("train", "test"):
        with tarfile.open(tmp_path / f"{part}.tar", "w") as tar:
            for path in sorted((root / part).glob("*/*")):
                info = tarfile.TarInfo(f"{path.parent.name}/{path.name}")
                info.size = path.stat().st_size
                tar.addfile(info, io.BytesIO(path.read_bytes()))
    from_tar, left_out = views_of(tmp_path, "torchvision", usable)
    assert left_out == {name for name, good in usable.items() if not good}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = open_dataset(root, image_size=65, on_bad_image="skip")
    (whole, *_) = [*EvalSource(dataset.train, (0.0,) * 3, (1.0,) * 3, batch_size=100).batches()]
    assert len(whole.sample_ids) == len(ours) + 2
    assert from_tar.keys() == ours.keys()
    for name in ours:
        assert from_tar[name].shape == (3, 65, 65)
