"""The walk through tars finds what Python's own reader finds, and nothing in what is no tar."""

import io
import os
import random
import re
import tarfile
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from stablekd_fast.data import open_dataset
from stablekd_fast.data.formats.archives import archive_records, read_index
from stablekd_fast.data.formats.sample import Sample
from stablekd_fast.errors import DataError
from tests.data.formats.packing import example, feature, framed, masked_crc32c, picture_bytes, tar_bytes, write_tar

IMAGE = picture_bytes()
LONG = f"class/{'long' * 50}.jpg"
FORMATS = {"USTAR": tarfile.USTAR_FORMAT, "GNU": tarfile.GNU_FORMAT, "PAX": tarfile.PAX_FORMAT}


def contents(path: Path, samples: list[Sample]) -> list[bytes]:
    records = archive_records([path], [samples])
    return [records.read(number) for number in range(len(records))]


@pytest.mark.parametrize("name", FORMATS)
def test_names_and_bytes_are_those_that_were_packed(tmp_path, name):
    rng = np.random.default_rng(0)
    names = ["a/x.jpg", f"{'deep/' * 25}class/x.jpg", "ü/ö.jpg", "a b/c\td.jpg", "a/" + "n" * 94 + ".jpg"]
    names += [LONG, "ж/" + "ж" * 120 + ".jpg"] if name != "USTAR" else []
    members = [(name, rng.bytes(size)) for name, size in zip(names, (0, 1, 511, 512, 513, 1024, 5000))]
    path = write_tar(tmp_path / "some.tar", members, format=FORMATS[name])
    samples = read_index(path)
    assert [(sample.name, sample.label) for sample in samples] == [(n, n.split("/")[-2]) for n, _ in members]
    assert contents(path, samples) == [content for _, content in members]


def test_names_that_are_no_utf8_are_kept_apart(tmp_path):
    names = [b"caf\xe9/x.jpg", b"caf\xe8/x.jpg"]
    path = write_tar(tmp_path / "some.tar", [(os.fsdecode(name), IMAGE) for name in names], format=tarfile.GNU_FORMAT)
    content = path.read_bytes()
    assert all(name in content for name in names)
    samples = read_index(path)
    assert len({sample.label for sample in samples}) == 2
    assert len(set(archive_records([path], [samples]).told_by())) == len(samples)


def test_directories_devices_and_notes_for_all_members_are_passed_over(tmp_path):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "for all"}) as archive:
        for name, kind in (("a", tarfile.DIRTYPE), ("pipe.jpg", tarfile.FIFOTYPE), ("a/x.jpg", tarfile.CONTTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, 700 if kind == tarfile.CONTTYPE else 0
            archive.addfile(info, io.BytesIO(bytes(700)))
    (tmp_path / "some.tar").write_bytes(file.getvalue())
    assert [(s.name, s.size) for s in read_index(tmp_path / "some.tar")] == [("a/x.jpg", 700)]


def test_a_size_in_binary_is_read(tmp_path):
    content = bytearray(tar_bytes([("a/x.jpg", IMAGE), ("a/y.jpg", IMAGE)]))
    content[124:136] = b"\x80" + len(IMAGE).to_bytes(11, "big")
    (tmp_path / "some.tar").write_bytes(resummed(content))
    assert [s.size for s in read_index(tmp_path / "some.tar")] == [len(IMAGE)] * 2


def test_tars_that_were_joined_are_read_to_the_end_and_a_rest_is_not_read(tmp_path):
    path = tmp_path / "some.tar"
    path.write_bytes(tar_bytes([("a/x.jpg", IMAGE)]) + tar_bytes([("b/x.jpg", IMAGE)]) + b"rest" * 300)
    assert [s.label for s in read_index(path)] == ["a", "b"]


def test_tars_in_a_tar_are_its_folders(tmp_path):
    """ILSVRC 2012 comes so: a tar for each class, in one."""
    images = {name: picture_bytes(k) for k, name in enumerate(("n01_1.JPEG", "n01_2.JPEG", "n02_7.JPEG"))}
    inner = {
        f"{label}.tar": tar_bytes([(name, image) for name, image in images.items() if name.startswith(label)])
        for label in ("n01", "n02")
    }
    path = write_tar(tmp_path / "ILSVRC2012_img_train.tar", inner | {"._n01.tar": b"mac"})
    samples = read_index(path)
    assert [(s.name, s.label) for s in samples] == [(f"{name[:3]}/{name}", name[:3]) for name in images]
    assert contents(path, samples) == list(images.values())
    linked = tar_bytes([("x.jpg", IMAGE), ("y.jpg", tarfile.LNKTYPE, "x.jpg"), ("z.jpg", tarfile.SYMTYPE, "y.jpg")])
    path = write_tar(tmp_path / "some.tar", {"train/n01.tar": linked})
    assert contents(path, read_index(path)) == [IMAGE] * 3


@pytest.mark.parametrize(
    ("inner", "said"),
    [
        (b"", "n02.tar in it: it is empty"),
        (bytes(10240), "n02.tar in it is empty"),
        (tar_bytes([("x.jpg", IMAGE)])[:700], "n02.tar in it: the member at byte .* would be"),
        (b"no tar at all", "n02.tar in it: it is no tar"),
    ],
)
def test_a_damaged_tar_in_a_tar_is_named(tmp_path, inner, said):
    path = write_tar(tmp_path / "some.tar", {"n01.tar": tar_bytes([("x.jpg", IMAGE)]), "n02.tar": inner})
    with pytest.raises(DataError, match=f"some.tar: {said}"):
        read_index(path)


@pytest.mark.parametrize(
    ("left", "said"),
    [
        (512 + 100, "the member at byte 512 would be"),
        (1024 + 512, "the member at byte 1536"),
        (1200, "in the midst of a h"),
    ],
)
def test_a_tar_cut_within_a_member_is_refused(tmp_path, left, said):
    path = tmp_path / "some.tar"
    path.write_bytes(tar_bytes([("a/x.jpg", bytes(300)), ("a/y.jpg", bytes(300))])[:left])
    with pytest.raises(DataError, match=f"some.tar: .*{said}"):
        read_index(path)


def test_a_tar_cut_between_members_is_pointed_out(tmp_path):
    path = tmp_path / "some.tar"
    path.write_bytes(tar_bytes([("a/x.jpg", bytes(300)), ("a/y.jpg", bytes(300))])[:1024])
    with pytest.warns(UserWarning, match="some.tar ends at byte 1024 without the mark that ends a tar"):
        assert len(read_index(path)) == 1


def test_a_damaged_header_does_not_end_a_tar_in_silence(tmp_path):
    content = bytearray(tar_bytes([(f"a/{k}.jpg", bytes(300)) for k in range(3)]))
    content[1024 + 2] ^= 1
    (tmp_path / "some.tar").write_bytes(content)
    with pytest.raises(DataError, match="there is no header of a member at byte 1024, where one must be"):
        read_index(tmp_path / "some.tar")


def test_a_member_with_holes_is_refused_by_name(tmp_path):
    info = tarfile.TarInfo("a/x.jpg")
    info.type = tarfile.GNUTYPE_SPARSE
    (tmp_path / "some.tar").write_bytes(resummed(bytearray(info.tobuf(tarfile.GNU_FORMAT))) + bytes(1024))
    with pytest.raises(DataError, match="a/x.jpg is stored with holes; write the archive without --sparse"):
        read_index(tmp_path / "some.tar")


def resummed(content: bytearray) -> bytes:
    """Give each header of a tar the sum that fits it."""
    for at in range(0, len(content) - 511, 512):
        header = content[at : at + 512]
        if header[257:262] == b"ustar":
            header[148:156] = b" " * 8
            header[148:156] = b"%06o\0 " % sum(header)
            content[at : at + 512] = header
    return bytes(content)


# Indexes.


def index_of(path: Path) -> list[list]:
    """What DALI's wds2idx lists: ending, offset, size and name of each member, a line for each sample."""
    with tarfile.open(path) as archive:
        return [[[m.name.split(".", 1)[1], m.offset_data, m.size, m.name]] for m in archive if m.isfile()]


def write_index(path: Path, lines: list[list], head: str | None = None) -> None:
    said = [" ".join(f"{word}" for member in line for word in member) for line in lines]
    path.with_suffix(".idx").write_text("\n".join([head or f"v1.2 {len(lines)}", *said]) + "\n")


@pytest.fixture
def indexed(tmp_path):
    """A tar with an index, and what it lists."""
    members = [(f"a/{k}.jpg", bytes([k]) * (100 + k)) for k in range(4)]
    path = write_tar(tmp_path / "some.tar", [*members, (LONG, IMAGE)], format=tarfile.GNU_FORMAT)
    return path, index_of(path)


@pytest.mark.parametrize("name", FORMATS)
def test_an_index_that_fits_gives_the_same_samples(tmp_path, name, monkeypatch):
    members = [
        ("./a/x.jpg", IMAGE),
        ("ж/ж.jpg", IMAGE),
        ("b/y.jpg", IMAGE),
        *([(LONG, IMAGE)] if name != "USTAR" else []),
    ]
    path = write_tar(tmp_path / "some.tar", members, format=FORMATS[name])
    by_walking = read_index(path)
    write_index(path, index_of(path))
    monkeypatch.setattr("stablekd_fast.data.formats.tars._walk", None)
    assert read_index(path) == by_walking


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda lines: lines[1][0].__setitem__(1, 10**7), r"a/1.jpg would lie at bytes 10000000 to .* archive ends at"),
        (lambda lines: lines[1][0].__setitem__(1, 0), "a/1.jpg would lie at bytes 0 to"),
        (lambda lines: lines[1][0].__setitem__(1, lines[2][0][1]), "the archive has no member a/1.jpg of 101 bytes"),
        (lambda lines: lines[1][0].__setitem__(2, 100), "the archive has no member a/1.jpg of 100 bytes"),
        (lambda lines: lines[1][0].__setitem__(3, "a/7.jpg"), "the archive has no member a/7.jpg"),
        (lambda lines: lines[1][0].__setitem__(1, "many"), "'many', and a whole number is needed"),
        (lambda lines: lines[1][0].__setitem__(2, -1), "'-1', and a whole number is needed"),
        (lambda lines: lines[1][0].pop(), "is not ENDING OFFSET SIZE NAME"),
        (lambda lines: lines.pop(), "it lists nothing behind byte .*, where the archive goes on"),
    ],
)
def test_an_index_of_another_tar_is_refused(indexed, change, said):
    path, lines = indexed
    change(lines)
    write_index(path, lines)
    with pytest.raises(DataError, match=f"some.tar by its index some.idx: .*{said}.*. Make the index anew or"):
        read_index(path)


@pytest.mark.parametrize("head", ["v1.1 5", "v1.2", "v1.2 4", "v1.2 five", ""])
def test_an_index_with_another_first_line_is_refused(indexed, head):
    path, lines = indexed
    write_index(path, lines, head or "\n")
    with pytest.raises(DataError, match=r"by its index some.idx: (an index of version v1.2|its first line is)"):
        read_index(path)


def test_an_empty_index_is_refused(indexed):
    path, _ = indexed
    path.with_suffix(".idx").write_bytes(b"")
    with pytest.raises(DataError, match="an index of version v1.2 is needed, its first line is 'missing'"):
        read_index(path)


# What comes of random damage.


def damaged(content: bytes, rng: random.Random) -> bytearray:
    found = bytearray(content)
    how = rng.randrange(4)
    if how == 0:
        for _ in range(rng.randrange(1, 6)):
            bit = rng.randrange(8 * len(found))
            found[bit // 8] ^= 1 << bit % 8
    elif how == 1:
        del found[rng.randrange(len(found)) :]
    elif how == 2:
        at = rng.randrange(len(found))
        found[at : at + rng.randrange(1, 40)] = rng.randbytes(rng.randrange(40))
    else:
        found = bytearray(rng.randbytes(rng.randrange(3000)))
    return found


def whole_archives() -> dict[str, list[bytes]]:
    soft, hard = tarfile.SYMTYPE, tarfile.LNKTYPE
    numbers = [("1.jpg", b"one"), ("1.cls", b"3"), ("2.jpg", b"two"), ("2.json", b'{"label": 3}')]
    links = [(LONG, b"one"), ("a/y.jpg", hard, LONG), ("b/z.jpg", soft, "../a/y.jpg")]
    records = [{"image": feature(b"x" * 50), "label": feature(k), "label_name": feature(b"cat")} for k in range(3)]
    return {
        "some.tar": [
            *(tar_bytes(members, format=tarfile.PAX_FORMAT) for members in (numbers, links)),
            tar_bytes([(LONG, b"one"), ("n01.tar", tar_bytes([("n01_1.JPEG", b"one")]))], format=tarfile.GNU_FORMAT),
        ],
        "some.tfrecord": [b"".join(framed(example(record)) for record in records)],
    }


@pytest.mark.parametrize("name", ["some.tar", "some.tfrecord"])
def test_random_damage_gives_samples_or_a_sentence(tmp_path, name):
    """A part of the damaged archives gets sums that fit, so that what lies behind the check of sums is reached too."""
    rng, outcomes = random.Random(0), Counter()
    path, wholes = tmp_path / name, whole_archives()[name]
    for _ in range(1200):
        content = damaged(rng.choice(wholes), rng)
        if rng.random() < 0.7:
            length = max(len(content) - 16, 0).to_bytes(8, "little")
            content = resummed(content) if name == "some.tar" else length + masked_crc32c(length) + content[12:]
        path.write_bytes(content)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                samples = read_index(path)
        except DataError as error:
            said = str(error)
            assert str(path) in said and said.endswith(".") and not re.search("Errno|invalid literal|unpack", said)
            outcomes["refused"] += 1
        else:
            assert all(0 <= s.offset <= s.offset + s.size <= len(content) for s in samples)
            outcomes["listed"] += 1
    assert min(outcomes.values()) > 20, outcomes


def test_a_damaged_index_gives_samples_or_a_sentence(indexed):
    path, lines = indexed
    write_index(path, lines)
    index, whole, rng = path.with_suffix(".idx"), read_index(path), random.Random(1)
    content = index.read_bytes()
    for _ in range(600):
        index.write_bytes(damaged(content, rng))
        try:
            assert set(read_index(path)) <= set(whole)
        except DataError as error:
            assert str(path) in str(error)


def test_an_archive_that_cannot_be_opened_is_named(tmp_path):
    write_tar(tmp_path / "train.tar", {"a/x.jpg": IMAGE})
    (tmp_path / "gone.tar").symlink_to("nowhere")
    with pytest.raises(DataError, match="gone.tar"):
        read_index(tmp_path / "gone.tar")
    with pytest.raises(DataError, match="none named test"):
        open_dataset(tmp_path)
