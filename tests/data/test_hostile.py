"""Files of strangers: whatever their bytes are, each reader ends in images or in one sentence, in little memory."""

import os
import pickle
import random
import warnings

import pytest
from PIL import Image

from stablekd_fast.data import open_dataset
from stablekd_fast.data.pixels import BadImage
from stablekd_fast.errors import DataError, StableKDError
from tests.data.small_files import FORMATS, jpeg, read, tars, tfrecords


def changed(content, draw):
    """A file with a few bits, bytes or numbers changed, cut short, or with a piece twice."""
    data = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(max(1, len(data)))
        how = draw.randrange(5)
        if how == 0:
            data[at : at + 1] = bytes([draw.randrange(256)])
        elif how == 1:
            data[at : at + draw.choice((1, 2, 4, 8))] = draw.choice((b"\xff", b"\x7f", b"\0", b"\x80")) * draw.choice(
                (1, 2, 4, 8)
            )
        elif how == 2:
            del data[at : at + draw.randint(1, 600)]
        elif how == 3:
            data[at:at] = data[at : at + draw.randint(1, 600)]
        else:
            del data[draw.randrange(len(data) + 1) :]
    return bytes(data)


@pytest.mark.parametrize("form", FORMATS)
def test_changed_files_are_read_or_named(tmp_path, form, little_memory):
    place, path = FORMATS[form](tmp_path)
    content, outcomes = path.read_bytes(), {True: 0, False: 0}
    read(place)
    for seed in range(60):
        path.write_bytes(changed(content, random.Random(f"{form} {seed}")))
        try:
            read(place)
            outcomes[True] += 1
        except StableKDError as error:
            assert str(error).count("\n") == 0 and len(str(error)) < 1500, error
            outcomes[False] += 1
    assert outcomes[False] > 10


@pytest.mark.parametrize("form", FORMATS)
def test_a_pipe_is_refused_and_not_waited_for(tmp_path, form):
    place, path = FORMATS[form](tmp_path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError):
        read(place)


def tree(folder):
    for name in ("train/a", "train/b", "val/a", "val/b"):
        (folder / name).mkdir(parents=True)
        for number in range(3):
            (folder / name / f"{number}.jpg").write_bytes(jpeg(number))
    return folder, folder / "train" / "a" / "0.jpg"


def endless(path):
    path.touch()
    os.truncate(path, 1 << 42)


def large(path):
    """A few kilobytes that are 12000 x 12000 pixels."""
    Image.new("1", (12000, 12000)).save(path, "PNG")


@pytest.mark.parametrize(
    ("put", "said"),
    [
        (os.mkfifo, "a pipe, a socket or a device"),
        (lambda path: path.symlink_to("/dev/zero"), "a pipe, a socket or a device"),
        (endless, "larger than"),
        (large, "12000 x 12000 pixels and others are 8 x 8"),
        (lambda path: path.symlink_to(path), "symbolic links"),
    ],
    ids=["pipe", "device", "endless", "large", "loop"],
)
def test_a_tree_holds_what_is_no_image(tmp_path, put, said, little_memory):
    place, path = tree(tmp_path)
    read(place)
    path.unlink()
    put(path)
    with pytest.raises(BadImage, match=said) as caught:
        read(place)
    assert str(path) in str(caught.value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert len(open_dataset(place, on_bad_image="skip").train) == 5


def test_a_changed_byte_of_a_record_is_noticed(tmp_path):
    """A label that is another one decodes as well as before: only the checksum tells."""
    place, path = tfrecords(tmp_path)
    read(place)
    content = path.read_bytes()
    label = content.index(b"image/class/label") + len(b"image/class/label\x12\x05\x1a\x03\x0a\x01")
    assert content[label] == 0
    path.write_bytes(content[:label] + b"\1" + content[label + 1 :])
    with pytest.raises(BadImage, match="checksum"):
        read(place)


def test_an_archive_that_goes_away_is_named(tmp_path):
    place, path = tars(tmp_path)
    data = open_dataset(place)
    records = data.train.records
    kept = pickle.loads(pickle.dumps(records))
    path.unlink()
    with pytest.raises(BadImage, match="No such file"):
        kept.read(0)
