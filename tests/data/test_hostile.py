"""Files of strangers: whatever their bytes are, each reader ends in images or in one sentence, in little memory."""

import gzip
import io
import os
import pickle
import random
import resource
import struct
import tarfile
import time
import warnings
import zipfile

import numpy as np
import pytest
from PIL import Image

from stablekd_fast.data import open_dataset
from stablekd_fast.data.pixels import BadImage
from stablekd_fast.errors import DataError, StableKDError

SIDE = 8
MEGABYTES = 400
"""So much more memory than before no reader may take, whatever a file announces."""
SECONDS = 5


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


@pytest.fixture
def little_memory():
    """Refuse memory beyond what the process has now and a little more."""
    now = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + (MEGABYTES << 20), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


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
