"""Images are told by what they hold: at once where they are few, by a log of digests where they are many."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image, ImageOps

from stablekd_fast.data import contents as contents_module
from stablekd_fast.data import open_dataset
from stablekd_fast.data.contents import Contents
from stablekd_fast.data.pixels import BadImage
from stablekd_fast.data.records import FileRecords
from stablekd_fast.errors import DataError


@pytest.fixture
def many(monkeypatch):
    """As if the images were too many to be read at once."""
    monkeypatch.setattr(contents_module, "READ_AT_ONCE", 0)


def bitmaps(root, count=4, size=70):
    """A folder of bitmaps: all files of one length, whatever they show."""
    for part in ("train", "test"):
        for label, name in enumerate("ab"):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.random.default_rng([label, number]).integers(0, 256, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{number}.bmp")
    return root


def change(path, keep_times=False):
    """Another picture of the same name and length."""
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    ImageOps.invert(Image.open(path)).save(path)
    os.utime(path, ns=times if keep_times else (times[0], times[1] + 10**9))


def identity(root):
    return open_dataset(root).train.identity()


@pytest.mark.parametrize("size", [70, 16])
def test_few_images_are_told_by_names_labels_and_contents(tmp_path, size):
    root = bitmaps(tmp_path / "d", size=size)
    first = identity(root)
    shutil.copytree(root, tmp_path / "elsewhere")
    assert identity(tmp_path / "elsewhere") == first
    change(root / "test" / "a" / "0.bmp")
    assert identity(root) == first
    change(root / "train" / "b" / "3.bmp", keep_times=True)
    changed = identity(root)
    assert changed != first and changed["samples"] == 8
    for one, other in (("a", "c"), ("b", "a"), ("c", "b")):
        (root / "train" / one).rename(root / "train" / other)
    assert identity(root) not in (first, changed)
    (root / "train" / "a" / "0.bmp").rename(root / "train" / "a" / "00.bmp")
    assert len({identity(root)["digest"], first["digest"], changed["digest"]}) == 3


def test_labels_are_a_part_of_the_identity(tmp_path):
    x = np.zeros((20, 8, 8, 3), np.uint8)
    found = []
    for labels in (np.arange(20) % 2, np.arange(20) // 10):
        np.savez(tmp_path / "d.npz", x_train=x, y_train=labels, x_test=x, y_test=labels)
        found.append(open_dataset(tmp_path / "d.npz").train.identity()["digest"])
    assert found[0] != found[1]


def read_all(split):
    for position in range(len(split)):
        split.usable(position, lambda content, name, sample: None)


def test_a_log_tells_changed_images_from_touched_ones(tmp_path, many):
    root, log = bitmaps(tmp_path / "d"), tmp_path / "rows" / "images.log"
    train = open_dataset(root).train
    first = train.identity()
    train.keep_digests(log)
    read_all(train)
    read_all(train)
    train.close()
    assert log.stat().st_size == 8 * 32, "each image has one record, however often it is read"
    assert open_dataset(root).train.identity() == first

    for path in (root / "train").rglob("*.bmp"):
        os.utime(path)  # as a copy does
    again = open_dataset(root).train
    with pytest.warns(UserWarning, match="8 of 8 images have another size or time of change"):
        again.keep_digests(log)
    again.close()
    assert log.stat().st_size == 16 * 32
    read = FileRecords.read
    try:
        FileRecords.read = lambda self, number: pytest.fail("nothing has changed since")  # type: ignore[method-assign]
        open_dataset_without_looking(root).keep_digests(log)
    finally:
        FileRecords.read = read

    change(root / "train" / "b" / "1.bmp")
    with pytest.raises(DataError, match=r"Other images than those that .*images.log was made from: .*b/1.bmp. Put"):
        open_dataset(root).train.keep_digests(log)


def open_dataset_without_looking(root):
    """Contents of the training images; opening the data set would read some of them."""

    class Told(Contents):
        def keep_digests(self, log):
            self.keep(log)

    names = [f"{label}/{number}.bmp" for label in "ab" for number in range(4)]
    return Told(FileRecords(str(root / "train"), names))


def test_an_image_that_changes_before_it_is_read_again_is_noticed(tmp_path, many):
    """The log is compared first; what it knows nothing of is compared when it is read."""
    root, log = bitmaps(tmp_path / "d"), tmp_path / "images.log"
    first, second = (open_dataset(root).train for _ in range(2))
    for split in (first, second):
        split.keep_digests(log)
    read_all(first)
    change(root / "train" / "a" / "2.bmp")
    read_all(second)
    with pytest.raises(DataError, match="a/2.bmp"):
        open_dataset(root).train.keep_digests(log)
    change(root / "train" / "a" / "3.bmp")
    third = open_dataset(root).train
    read_all(third)  # before anybody wants digests
    third.close()


def test_a_torn_or_damaged_log_is_not_believed(tmp_path, many):
    root, log = bitmaps(tmp_path / "d"), tmp_path / "images.log"
    train = open_dataset(root).train
    train.keep_digests(log)
    read_all(train)
    train.close()
    content = bytearray(log.read_bytes())
    content[3 * 32 + 8] ^= 1  # the digest of one image
    log.write_bytes(content[:-5])
    change(root / "train" / "a" / "3.bmp")  # the damaged record is its own; the torn one is the last image's
    change(root / "train" / "b" / "3.bmp")
    again = open_dataset(root).train
    again.keep_digests(log)
    read_all(again)
    again.close()
    assert log.stat().st_size == (8 + 1 + 1) * 32, "one record more for each of the two, behind the torn one"
    for name in ("a/3", "b/2", "b/3"):
        change(root / "train" / f"{name}.bmp")
        with pytest.raises(DataError, match=f"{name}.bmp. Put"):
            open_dataset(root).train.keep_digests(log)
        change(root / "train" / f"{name}.bmp")


def test_images_that_cannot_be_read_have_an_identity_too(tmp_path):
    root = bitmaps(tmp_path / "d")
    os.symlink("/nowhere.bmp", root / "train" / "a" / "9.bmp")
    first = open_dataset(root, on_bad_image="skip").train
    found = first.identity()
    assert found["samples"] == 9
    with pytest.raises(BadImage, match="No such file"):
        Contents(FileRecords(str(root / "train"), ["a/9.bmp"])).read(0)
    shutil.copy(root / "train" / "a" / "1.bmp", tmp_path / "x.bmp")
    (root / "train" / "a" / "9.bmp").unlink()
    shutil.move(tmp_path / "x.bmp", root / "train" / "a" / "9.bmp")
    assert open_dataset(root, on_bad_image="skip").train.identity() != found


def test_what_is_read_for_its_digest_is_not_read_again_for_its_pixels(tmp_path, monkeypatch):
    train, opened, read = open_dataset(bitmaps(tmp_path / "d")).train, [], FileRecords.read
    monkeypatch.setattr(FileRecords, "read", lambda self, number: (opened.append(number), read(self, number))[1])
    train.identity()
    read_all(train)
    assert sorted(opened) == list(range(8))
    read_all(train)
    assert len(opened) == 16


def test_a_log_that_cannot_be_written_is_said(tmp_path, many):
    (tmp_path / "file").touch()
    train = open_dataset(bitmaps(tmp_path / "d")).train
    with pytest.warns(UserWarning, match="images.log cannot be written"):
        train.keep_digests(tmp_path / "file" / "images.log")
    read_all(train)
