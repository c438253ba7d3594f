"""Records of TensorFlow: which features are image and class, and what is said of those that are not."""

import gzip
from collections import Counter

import pytest

from stablekd_fast.data import open_dataset
from stablekd_fast.data.formats.archives import archive_records, read_index
from stablekd_fast.errors import DataError
from tests.data.formats.packing import (
    example,
    feature,
    field,
    framed,
    masked_crc32c,
    picture_bytes,
    varint,
    write_tfrecords,
)  # fmt: skip

IMAGE = picture_bytes()
NUMBERED = {"image/encoded": feature(IMAGE), "image/class/label": feature(3)}


@pytest.fixture
def listed(tmp_path):
    """Lists a file of these records: the class of each, and how many were left out, by reason."""

    def lister(*records):
        left_out = Counter()
        path = write_tfrecords(tmp_path / "some.tfrecord", records)
        samples = read_index(path, left_out)
        found = archive_records([path], [samples])
        assert all(found.read(number) == IMAGE for number in range(len(found)))
        return {sample.name: sample.label for sample in samples}, dict(left_out)

    return lister


@pytest.mark.parametrize("image", ["image/encoded", "encoded", "image"])
@pytest.mark.parametrize(
    ("features", "label"),
    [
        ({"image/class/label": feature(300)}, 300),
        ({"label": feature(0)}, 0),
        ({"class": feature(b"5")}, 5),
        ({"label": feature(b"tench")}, "tench"),
        ({"image/class/text": feature("Dürer".encode())}, "Dürer"),
        ({"image/class/synset": feature(b"n01440764"), "image/class/text": feature(b"tench")}, "n01440764"),
        ({"image/class/text": feature(b"tench"), "image/class/label": feature(7)}, 7),
        ({"image/class/text": feature(b"tench"), "image/class/label": feature()}, "tench"),
        ({"label": feature(-5)}, -5),
        ({"label": field(3, varint(1 << 3) + varint(9))}, 9),
    ],
)
def test_a_class_is_a_number_or_a_name(listed, image, features, label):
    assert listed({"image/width": feature(8), image: feature(IMAGE)} | features) == ({"0": label}, {})


def test_records_without_image_or_class_are_counted_and_keep_their_numbers(listed):
    without = [{}, {"label": feature(3)}, {"image": feature(IMAGE)}, {"image": feature(IMAGE), "label": feature()}]
    unlabelled = {"image": feature(IMAGE), "label": feature(-1)}
    assert listed(*without, NUMBERED, unlabelled) == ({"4": 3}, {"no image": 2, "no class": 3})


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"image/class/label": feature(3, 4)}, "its image/class/label has 2 values, and needed is one"),
        ({"image/class/label": field(3, varint(8) + varint(3) + varint(8) + varint(4))}, "label has 2 values"),
        ({"image/class/label": feature(b"a", b"b")}, "its image/class/label has 2 values"),
        ({"image/class/label": feature(*range(50))}, "its image/class/label has many values"),
        ({"image/class/label": feature(1.0)}, "its image/class/label is a list of fractions"),
        ({"image/class/label": field(4, b"")}, "its image/class/label is of kind 4"),
        ({"image/class/label": feature(1) + feature(2)}, "its image/class/label has 2 lists of values"),
        ({"image/class/label": feature(b"\xff")}, "its image/class/label begins with .* which is no UTF-8"),
        ({"image/encoded": feature(IMAGE, IMAGE)}, "its image/encoded has 2 values"),
        ({"image/encoded": feature(1, 2)}, "its image/encoded has 2 values"),
        ({"image/encoded": feature(1)}, "its image/encoded is a list of numbers, and needed is an encoded image"),
        ({b"\xff\xfe": feature(1)}, r"its key b'\\xff\\xfe' is no UTF-8 text"),
    ],
)
def test_a_record_that_cannot_be_used_is_named(listed, changed, said):
    with pytest.raises(DataError, match=f"some.tfrecord: record 1 at byte .*{said}"):
        listed(NUMBERED, NUMBERED | changed)


def test_a_feature_that_is_there_twice_is_refused(tmp_path):
    twice = example(NUMBERED) + example({"image/class/label": feature(4)})
    (tmp_path / "some.tfrecord").write_bytes(framed(twice))
    with pytest.raises(DataError, match="it has image/class/label twice"):
        read_index(tmp_path / "some.tfrecord")


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (b"\x0a", "a number goes on behind the end"),
        (b"\xff" * 40, "a number goes on behind the end"),
        (b"\x0a\x7f", "is longer than the message that holds it"),
        (b"\x0d1234", "a field of kind 5 at byte"),
        (field(1, field(1, b"")), "has no key, which belongs to no tf.train.Example"),
        (field(1, field(1, field(2, b"value"))), "has no key, which belongs to no tf.train.Example"),
    ],
)
def test_what_is_no_example_is_said(tmp_path, record, said):
    (tmp_path / "some.tfrecord").write_bytes(framed(record))
    with pytest.raises(DataError, match=f"record 0 at byte 0: .*{said}"):
        read_index(tmp_path / "some.tfrecord")


def test_an_entry_may_have_its_value_before_its_key(tmp_path):
    turned = b"".join(field(1, field(2, value) + field(1, key.encode())) for key, value in NUMBERED.items())
    (tmp_path / "some.tfrecord").write_bytes(framed(field(1, turned)))
    assert [sample.label for sample in read_index(tmp_path / "some.tfrecord")] == [3]


def test_the_checksum_of_crc32c_is_the_published_one():
    assert masked_crc32c(b"123456789") == (((0xE3069283 >> 15 | 0xE3069283 << 17) + 0xA282EAD8) % 2**32).to_bytes(
        4, "little"
    )


def test_a_flipped_bit_in_a_length_is_noticed(tmp_path):
    path = write_tfrecords(tmp_path / "some.tfrecord", [NUMBERED] * 3)
    whole = path.read_bytes()
    for bit in range(8 * 12):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"at byte 0 (would be|does not fit its checksum)"):
            read_index(path)


@pytest.mark.parametrize("cut", [1, 5, 16, 100])
def test_a_file_that_ends_early_is_refused(tmp_path, cut):
    path = write_tfrecords(tmp_path / "some.tfrecord", [NUMBERED] * 2)
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(DataError, match="some.tfrecord: a record at byte .* would be .* and the file ends at"):
        read_index(path)
    path.write_bytes(framed(example(NUMBERED)) + b"12345")
    with pytest.raises(DataError, match="the file ends at .*, in the midst of a record that begins at byte"):
        read_index(path)


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ([], "some.tfrecord: it is empty"),
        ([{"label": feature(3)}] * 2, "none of its 2 records has a value of image/encoded, encoded, image"),
        (
            [{"image": feature(IMAGE)}],
            "None of the 1 records in .* has a class; give them a value of",
        ),
    ],
)
def test_a_file_without_images_or_classes_is_named(listed, records, said):
    with pytest.raises(DataError, match=said):
        listed(*records)


def test_a_compressed_file_is_to_be_written_anew(tmp_path):
    (tmp_path / "some.tfrecord").write_bytes(gzip.compress(framed(example(NUMBERED))))
    with pytest.raises(DataError, match="some.tfrecord: it is compressed by gzip, and images are read in place"):
        read_index(tmp_path / "some.tfrecord")


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("0 {0}\n{0} {0}\n", None),
        ("0 {0}\n", "its records end at byte {0}, and the file ends at"),
        ("{0} {0}\n", "begins at byte {0}, and the file has none"),
        ("0 99\n", "a record of 99 bytes begins at byte 0, and the file has none"),
        ("0 {0}\n{0} {0}\n99999 9\n", "begins at byte 99999, and the file has none"),
        ("0 -3\n", "its line '0 -3' is not OFFSET SIZE"),
        ("one two\n", "its line 'one two' is not OFFSET SIZE"),
        ("1 2 3\n", "its line '1 2 3' is not OFFSET SIZE"),
    ],
)
def test_an_index_fits_or_is_refused(tmp_path, lines, said):
    path = write_tfrecords(tmp_path / "some.tfrecord", [NUMBERED] * 2)
    size = path.stat().st_size // 2
    (tmp_path / "some.tfrecord.idx").write_text(lines.format(size))
    if said is None:
        assert len(read_index(path)) == 2
        return
    with pytest.raises(DataError, match=f"by its index some.tfrecord.idx: .*{said.format(size)}"):
        read_index(path)


def test_names_as_tensorflow_datasets_gives_them_are_found(tmp_path):
    for part, label in (("train", 0), ("validation", 0), ("test", -1)):
        path = tmp_path / f"imagenet2012-{part}.tfrecord-00000-of-00001"
        write_tfrecords(path, [{"image": feature(IMAGE), "label": feature(label)}] * 2)
    dataset = open_dataset(tmp_path)
    assert (len(dataset.train), len(dataset.test)) == (2, 2)
    assert "validation" in str(dataset.test.paths[0])
