"""Files that announce what cannot be: each is refused in one sentence, in little time and memory."""

import gzip
import io
import pickle
import struct
import tarfile
import time
import zipfile

import numpy as np
import pytest

from stablekd_fast.errors import DataError
from tests.data.small_files import cifar, crc, field, idx, jpeg, npz, packed_cifar, packed_idx, read, tars, tfrecords

SECONDS = 5


def member(name, size, kind=b"0"):
    """A tar's header that announces any size."""
    header = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\x80" + size.to_bytes(11, "big")
    header[156:157] = kind
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + bytes(1024)


def overwritten(path, offset, value):
    """An npz whose entries have one byte of their local and central headers changed."""
    data = bytearray(path.read_bytes())
    for mark, shift in ((b"PK\3\4", 0), (b"PK\1\2", 2)):
        at = data.find(mark)
        while at >= 0:
            data[at + shift + offset] = value
            at = data.find(mark, at + 4)
    path.write_bytes(data)


def npz_of_shape(shape):
    return lambda folder: npz_of_header(folder, f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}")


def npz_of_header(folder, header):
    """An npz whose x_train has a header of its own."""
    place, path = npz(folder)
    with np.load(path) as arrays:
        kept = {name: arrays[name] for name in arrays if name != "x_train"}
    np.savez(path, **kept)
    with zipfile.ZipFile(path, "a") as archive:
        text = header.encode().ljust(117) + b"\n"
        archive.writestr("x_train.npy", b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text)
    return place


def pickled(opcodes):
    def make(folder):
        place, path = cifar(folder)
        path.write_bytes(opcodes)
        return place

    return make


def written(make, content):
    def made(folder):
        place, path = make(folder)
        path.write_bytes(content)
        return place

    return made


def twice(value, times):
    """Lists that hold the one before twice: few in a file, 2^times to whoever walks through them."""
    for _ in range(times):
        value = [value, value]
    return value


def cifar_batch(labels):
    return pickle.dumps({"data": np.zeros((4, 3072), np.uint8), "fine_labels": labels}, 2)


def names(folder, found):
    cifar(folder)
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": found}, 2))
    return folder


def packed(members):
    """The archive of `tars` with these members."""

    def make(folder):
        place, path = tars(folder)
        with tarfile.open(path, "w") as archive:
            for name, content in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        return place

    return make


def framed(content):
    length = struct.pack("<Q", len(content))
    return length + struct.pack("<I", crc(length)) + content + bytes(4)


def record(label):
    """A record of an image whose label is this tf.train.Feature."""
    image = field(1, field(1, b"image/encoded") + field(2, field(1, field(1, jpeg(1)))))
    return framed(field(1, image + field(1, field(1, b"image/class/label") + field(2, label))))


CASES = {
    "idx of 0 x 2^32 x 2^32": written(idx, struct.pack(">4I", 0x803, 0, 2**32 - 1, 2**32 - 1)),
    "idx of 2^96 bytes": written(idx, struct.pack(">4I", 0x803, *[2**32 - 1] * 3)),
    "idx.gz that unpacks to more": written(
        packed_idx, gzip.compress(struct.pack(">4I", 0x803, 1, 1, 1) + bytes(1 << 28))
    ),
    "npz, encrypted": lambda folder: (npz(folder)[0], overwritten(folder / "own.npz", 6, 1))[0],
    "npz, unknown compression": lambda folder: (npz(folder)[0], overwritten(folder / "own.npz", 8, 99))[0],
    "npz of structures": lambda folder: npz(folder, y_train=np.zeros(4, [("a", "i4")]))[0],
    "npz of objects": lambda folder: npz(folder, y_train=np.array([{}, {}, {}, {}]))[0],
    "npz of 10^13 numbers": npz_of_shape("(10000000000000,)"),
    "npz of no shape": npz_of_shape("'x'"),
    "npz of a negative side": npz_of_shape("(-1,)"),
    "npz of a deep header": lambda f: npz_of_header(f, "[" * 100),
    "cifar of an array of 10^13": pickled(
        b"\x80\x02}X\4\0\0\0datacnumpy\nndarray\n\x8a\6" + (10**13).to_bytes(6, "little") + b"\x85X\2\0\0\0u1\x86Rs."
    ),
    "cifar of a bytearray of 2^40": pickled(
        b"\x80\x02c__builtin__\nbytearray\n\x8a\6" + (1 << 40).to_bytes(6, "little") + b"\x85R."
    ),
    "cifar that remembers number 2^31": pickled(b"\x80\x02]r\xff\xff\xff\x7f."),
    "cifar of labels as text": lambda folder: written(
        cifar, pickle.dumps({"data": np.zeros((4, 3072), np.uint8), "fine_labels": "abcd"}, 2)
    )(folder),
    "cifar of text 2^62 bytes long": pickled(b"\x80\x04\x8d" + (1 << 62).to_bytes(8, "little") + b"x."),
    "cifar of 100,000 tuples in each other": pickled(b"\x80\x02)" + b"\x85" * 100_000 + b"."),
    **{
        f"cifar.tar.gz with a member of 2^{power}": written(packed_cifar, gzip.compress(member("x/train", 1 << power)))
        for power in (40, 62, 86)
    },
    **{f"tar with a member of 2^{power}": written(tars, member("a.cls", 1 << power)) for power in (40, 62, 66, 87)},
    "tar with a name of 2^62": written(tars, member("x", 1 << 62, b"L")),
    "tar of a PAX line of 2^60": written(
        tars, member("x", 600, b"x")[:512] + b"1152921504606846976 path=x\n".ljust(1024, b"\0")
    ),
    "tfrecord of 2^63 bytes": written(
        tfrecords, struct.pack("<QI", 1 << 63, crc(struct.pack("<Q", 1 << 63))) + bytes(64)
    ),
    "cifar of a tuple that holds itself twice, sixty times": pickled(b"\x80\x02})" + b"2\x86" * 60 + b"K\1s."),
    "cifar of labels in lists of lists": written(cifar, cifar_batch(twice([0, 1], 26))),
    "cifar of names in lists of lists": lambda folder: names(folder, [twice([], 26)]),
    "cifar of a bytearray of lists of lists": pickled(
        b"\x80\x02c__builtin__\nbytearray\n(" + pickle.dumps(twice([], 26), 2)[2:-1] + b"tR."
    ),
    "idx.gz of more than memory": written(
        packed_idx, gzip.compress(struct.pack(">4I", 0x803, 1 << 14, 1 << 14, 1 << 14) + bytes(100))
    ),
    "tar of a class beyond 64 bits": packed({"a.jpg": jpeg(1), "a.json": b'{"label": %s}' % (b"9" * 4000)}),
    "tar of a name of a megabyte": packed(
        {f"{'x' * 10**6}.jpg": jpeg(1), f"{'x' * 10**6}.png": jpeg(1), "a.cls": b"0"}
    ),
    "tar of a name of slashes": packed({"/" * 10**6 + "a.jpg": jpeg(1), "a.cls": b"0"}),
    "tfrecord of many lists": written(tfrecords, record(b"\x0a\0" * (1 << 23))),
    "tfrecord of many values": written(tfrecords, record(field(1, b"\x0a\0" * (1 << 23)))),
    "tfrecord of an endless number": written(tfrecords, framed(b"\x0a" + b"\x80" * 63)),
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_is_one_sentence(tmp_path, case, little_memory):
    place = CASES[case](tmp_path)
    begun = time.process_time()
    with pytest.raises(DataError) as caught:
        read(place)
    assert time.process_time() - begun < SECONDS
    assert "more than memory holds" not in str(caught.value), "it was asked for"
    assert "MemoryError" not in str(caught.value), "it was asked for"
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 1500
