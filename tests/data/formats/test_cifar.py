"""Archives with the names, layouts and pickles of the published ones, 20 images a batch."""

import io
import pickle
import tarfile
from typing import ClassVar

import numpy as np
import pytest

from stablekd_fast.data import open_dataset
from stablekd_fast.errors import DataError

COUNT = 20
NAMES_10 = "airplane automobile bird cat deer dog frog horse ship truck".split()
NAMES_100 = [f"class_{number:02d}" for number in range(100)]


class Python2Pickler(pickle._Pickler):
    """Writes byte strings as Python 2 did, which is how the published files hold text and pixels."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_string(self, value: bytes):
        self.write(pickle.BINSTRING + len(value).to_bytes(4, "little") + value)
        self.memoize(value)

    dispatch[bytes] = save_string


def python2_pickle(value) -> bytes:
    stream = io.BytesIO()
    Python2Pickler(stream, protocol=2).dump(value)
    # The name that numpy's function had when the files were written.
    return stream.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def python3_pickle(value) -> bytes:
    return pickle.dumps(value, protocol=2)


def batch(seed: int, classes: int) -> tuple[np.ndarray, list[int]]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (COUNT, 3072), dtype=np.uint8), rng.integers(0, classes, COUNT).tolist()


def cifar10_python(dump) -> dict[str, bytes]:
    members = {}
    for seed, name in enumerate([*(f"data_batch_{part}" for part in range(1, 6)), "test_batch"]):
        data, labels = batch(seed, 10)
        content = {b"batch_label": b"a batch", b"labels": labels, b"data": data, b"filenames": [b"a.png"] * COUNT}
        members[f"cifar-10-batches-py/{name}"] = dump(content)
    meta = {b"num_cases_per_batch": COUNT, b"label_names": [name.encode() for name in NAMES_10], b"num_vis": 3072}
    members["cifar-10-batches-py/batches.meta"] = dump(meta)
    members["cifar-10-batches-py/readme.html"] = b"<html>"
    return members


def cifar10_binary() -> dict[str, bytes]:
    members = {}
    for seed, name in enumerate([*(f"data_batch_{part}.bin" for part in range(1, 6)), "test_batch.bin"]):
        data, labels = batch(seed, 10)
        records = np.concatenate([np.array(labels, np.uint8)[:, None], data], axis=1)
        members[f"cifar-10-batches-bin/{name}"] = records.tobytes()
    members["cifar-10-batches-bin/batches.meta.txt"] = ("\n".join(NAMES_10) + "\n\n").encode()
    return members


def cifar100_python(dump) -> dict[str, bytes]:
    members = {"cifar-100-python/file.txt~": b""}
    for seed, name in ((0, "train"), (5, "test")):
        data, labels = batch(seed, 100)
        content = {b"fine_labels": labels, b"coarse_labels": [label % 20 for label in labels], b"data": data}
        members[f"cifar-100-python/{name}"] = dump(content)
    meta = {
        b"fine_label_names": [name.encode() for name in NAMES_100],
        b"coarse_label_names": [b"coarse"] * 20,
    }
    members["cifar-100-python/meta"] = dump(meta)
    return members


def cifar100_binary() -> dict[str, bytes]:
    members = {"cifar-100-binary/coarse_label_names.txt": b"coarse\n" * 20}
    for seed, name in ((0, "train.bin"), (5, "test.bin")):
        data, labels = batch(seed, 100)
        fine = np.array(labels, np.uint8)[:, None]
        members[f"cifar-100-binary/{name}"] = np.concatenate([fine % 20, fine, data], axis=1).tobytes()
    members["cifar-100-binary/fine_label_names.txt"] = ("\n".join(NAMES_100) + "\n").encode()
    return members


def pack(members: dict[str, bytes], path):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def unpack(members: dict[str, bytes], root):
    for name, content in members.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def expected_images(seeds) -> np.ndarray:
    """Pixel (y, x) of channel c stands at c * 1024 + y * 32 + x of a row."""
    rows = np.concatenate([batch(seed, 10)[0] for seed in seeds])
    return np.stack([rows[:, channel * 1024 : (channel + 1) * 1024].reshape(-1, 32, 32) for channel in range(3)], -1)


VERSIONS = {
    "python2": (lambda: cifar10_python(python2_pickle), lambda: cifar100_python(python2_pickle)),
    "python3": (lambda: cifar10_python(python3_pickle), lambda: cifar100_python(python3_pickle)),
    "binary": (cifar10_binary, cifar100_binary),
}


@pytest.mark.parametrize("place", ["archive", "folder", "folder above"])
@pytest.mark.parametrize("version", VERSIONS)
def test_cifar10(tmp_path, version, place):
    members = VERSIONS[version][0]()
    if place == "archive":
        path = pack(members, tmp_path / "cifar-10.tar.gz")
    else:
        root = unpack(members, tmp_path / "data")
        path = root if place == "folder above" else root / next(iter(members)).split("/")[0]
    dataset = open_dataset(path)
    assert (dataset.name, dataset.classes) == ("cifar10", NAMES_10)
    assert np.array_equal(dataset.train.images, expected_images(range(5)))
    assert np.array_equal(dataset.test.images, expected_images([5]))
    assert dataset.train.labels.tolist() == [label for seed in range(5) for label in batch(seed, 10)[1]]
    assert dataset.test.labels.tolist() == batch(5, 10)[1]
    assert (dataset.augmentation.padding, dataset.augmentation.flip) == (4, True)
    assert dataset.mean == (0.4914, 0.4822, 0.4465)


@pytest.mark.parametrize("version", VERSIONS)
def test_cifar100_uses_fine_labels(tmp_path, version):
    dataset = open_dataset(pack(VERSIONS[version][1](), tmp_path / "cifar-100.tar.gz"))
    assert (dataset.name, dataset.classes) == ("cifar100", NAMES_100)
    assert dataset.train.labels.tolist() == batch(0, 100)[1]
    assert dataset.test.labels.tolist() == batch(5, 100)[1]
    assert len(dataset.train.images) == COUNT


class Hostile:
    def __reduce__(self):
        return print, ("code from a data set",)


@pytest.mark.parametrize("content", [{b"data": Hostile()}, Hostile()])
def test_no_foreign_code_is_run(tmp_path, capsys, content):
    members = cifar10_python(python2_pickle)
    members["cifar-10-batches-py/data_batch_3"] = python3_pickle(content)
    with pytest.raises(DataError, match="damaged or not cifar10"):
        open_dataset(pack(members, tmp_path / "cifar-10.tar.gz"))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"text",
        cifar10_python(python2_pickle)["cifar-10-batches-py/data_batch_2"][:-100],
        python2_pickle([1, 2]),
        python2_pickle({b"labels": [0]}),
        python2_pickle({b"labels": [0], b"data": np.zeros((1, 3071), np.uint8)}),
        python2_pickle({b"labels": [0], b"data": np.zeros((1, 3072), np.float32)}),
    ],
)
def test_damaged_batch_is_reported(tmp_path, content):
    members = cifar10_python(python2_pickle)
    members["cifar-10-batches-py/data_batch_2"] = content
    with pytest.raises(DataError, match="cifar-10.tar.gz: .* damaged or not cifar10"):
        open_dataset(pack(members, tmp_path / "cifar-10.tar.gz"))


def test_label_out_of_range(tmp_path):
    members = cifar10_binary()
    name = "cifar-10-batches-bin/test_batch.bin"
    members[name] = b"\x0a" + members[name][1:]
    with pytest.raises(DataError, match="test part: label 10 of image 0 is out of range"):
        open_dataset(pack(members, tmp_path / "cifar-10.tar.gz"))


@pytest.mark.parametrize("lost", ["data_batch_1", "data_batch_4", "test_batch", "batches.meta"])
def test_missing_member_is_named(tmp_path, lost):
    members = cifar10_python(python2_pickle)
    del members[f"cifar-10-batches-py/{lost}"]
    with pytest.raises(DataError, match=f"lacks {lost} of cifar10"):
        open_dataset(pack(members, tmp_path / "cifar-10.tar.gz"))
    with pytest.raises(DataError, match=f"lacks {lost} of cifar10"):
        open_dataset(unpack(members, tmp_path / "data"))


def test_truncated_archive_is_named(tmp_path):
    path = pack(cifar10_binary(), tmp_path / "cifar-10.tar.gz")
    path.write_bytes(path.read_bytes()[:-20_000])
    with pytest.raises(DataError, match="Cannot read .*cifar-10.tar.gz"):
        open_dataset(path)


@pytest.mark.parametrize("name", ["flowers.tar.gz", "flowers.tgz", "flowers.zip"])
def test_other_archives_are_to_be_unpacked_first(tmp_path, name):
    path = pack({f"train/rose/{number}.png": b"" for number in range(40)}, tmp_path / name)
    with pytest.raises(DataError, match="unpack it first"):
        open_dataset(path)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "notes.md").write_text("hello")
    with pytest.raises(DataError, match="no known data set"):
        open_dataset(tmp_path / "notes.md")
