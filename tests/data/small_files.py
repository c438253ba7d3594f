"""Small data sets, one in each format: a function makes one in a folder, and returns its place and one of its files."""

import gzip
import io
import pickle
import struct
import tarfile
import warnings

import numpy as np
from PIL import Image

from stablekd_fast.data import open_dataset

SIDE = 8


def jpeg(value):
    content = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), (value, 30, 90)).save(content, "JPEG")
    return content.getvalue()


def idx(folder):
    for part, count in (("train", 4), ("t10k", 2)):
        images = struct.pack(">4I", 0x803, count, SIDE, SIDE) + bytes(range(64)) * count
        (folder / f"{part}-images-idx3-ubyte").write_bytes(images)
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, count) + bytes(range(count)))
    return folder, folder / "train-images-idx3-ubyte"


def packed_idx(folder):
    idx(folder)
    for path in list(folder.iterdir()):
        (folder / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    return folder, folder / "t10k-images-idx3-ubyte.gz"


def npz(folder, **changes):
    arrays = {
        "x_train": np.zeros((4, SIDE, SIDE, 3), np.uint8), "y_train": np.array([0, 1, 0, 1]),
        "x_test": np.zeros((2, SIDE, SIDE, 3), np.uint8), "y_test": np.array([0, 1]), **changes,
    }  # fmt: skip
    np.savez_compressed(folder / "own.npz", **arrays)
    return folder / "own.npz", folder / "own.npz"


def cifar(folder):
    batch = {"data": np.zeros((4, 3072), np.uint8), "fine_labels": [0, 1, 0, 1]}
    for name in ("train", "test"):
        (folder / name).write_bytes(pickle.dumps(batch, 2))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": ["a", "b"]}, 2))
    return folder, folder / "train"


def packed_cifar(folder):
    inner = folder / "inner"
    inner.mkdir()
    cifar(inner)
    with tarfile.open(folder / "cifar.tar.gz", "w:gz") as archive:
        for path in sorted(inner.iterdir()):
            archive.add(path, f"cifar/{path.name}")
    return folder / "cifar.tar.gz", folder / "cifar.tar.gz"


def tars(folder):
    for name in ("train", "val"):
        with tarfile.open(folder / f"{name}.tar", "w") as archive:
            for number in range(4):
                for ending, content in (("jpg", jpeg(number)), ("cls", str(number % 2).encode())):
                    member = tarfile.TarInfo(f"{number}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return folder, folder / "train.tar"


def crc(content):
    table = [0] * 256
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table[byte] = value
    found = 0xFFFFFFFF
    for byte in content:
        found = found >> 8 ^ table[(found ^ byte) & 255]
    found ^= 0xFFFFFFFF
    return ((found >> 15 | found << 17) + 0xA282EAD8) & 0xFFFFFFFF


def field(number, content):
    size, head = len(content), bytes([number << 3 | 2])
    while size > 127:
        head, size = head + bytes([size & 127 | 128]), size >> 7
    return head + bytes([size]) + content


def tfrecords(folder):
    for name in ("train", "validation"):
        data = b""
        for number in range(4):
            image = field(1, field(1, b"image/encoded") + field(2, field(1, field(1, jpeg(number)))))
            label = field(1, field(1, b"image/class/label") + field(2, field(3, field(1, bytes([number % 2])))))
            content = field(1, image + label)
            length = struct.pack("<Q", len(content))
            data += length + struct.pack("<I", crc(length)) + content + struct.pack("<I", crc(content))
        (folder / f"{name}-00000-of-00001").write_bytes(data)
    return folder, folder / "train-00000-of-00001"


FORMATS = {
    "idx": idx, "idx.gz": packed_idx, "npz": npz, "cifar": cifar, "cifar.tar.gz": packed_cifar, "tar": tars,
    "tfrecord": tfrecords,
}  # fmt: skip


def read(place):
    """Open a data set and read all of its images."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = open_dataset(place)
        for split in (data.train, data.test):
            assert len(split.images) == len(split)
