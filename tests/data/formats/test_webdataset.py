"""What is a sample of a tar, and where its class comes from."""

import json
import tarfile
from collections import Counter

import pytest

from stablekd_fast.data import open_dataset
from stablekd_fast.data.formats.archives import read_index
from stablekd_fast.errors import DataError
from tests.data.formats.packing import feature, picture_bytes, tar_bytes, write_tar, write_tfrecords

IMAGE, OTHER = picture_bytes(100), picture_bytes(200)


@pytest.fixture
def listed(tmp_path):
    """Lists a tar of these members: name and class of each sample, and how many members were left out, by reason."""

    def lister(members, **settings):
        left_out = Counter()
        samples = read_index(write_tar(tmp_path / "some.tar", members, **settings), left_out)
        return {sample.name: sample.label for sample in samples}, dict(+left_out)

    return lister


def test_every_file_of_a_class_folder_is_a_sample_whatever_dots_its_name_has(listed, tmp_path):
    members = [(f"{c}/img.{k:03d}.jpg", IMAGE) for c in "ab" for k in range(50)]
    assert listed(members) == ({name: name[0] for name, _ in members}, {})
    write_tar(tmp_path / "train.tar", members)
    write_tar(tmp_path / "val.tar", members[::7])
    assert len(open_dataset(tmp_path).train) == 100


def test_folders_on_the_way_may_have_dots_too(listed):
    assert listed({"./v1.0/a.b/x.1.jpg": IMAGE, "./v1.0/a.b/x.2.jpg": IMAGE, "/v1.0/c/x.jpg": IMAGE}) == (
        {"v1.0/a.b/x.1.jpg": "a.b", "v1.0/a.b/x.2.jpg": "a.b", "v1.0/c/x.jpg": "c"},
        {},
    )


@pytest.mark.parametrize("main", ["0.jpg", "0.JPEG", "0.input.jpg", "0.image.png", "0.img.webp"])
def test_other_images_of_a_sample_are_no_samples_and_are_counted(listed, main):
    for order in (1, -1):
        members = [("0.cls", b"4"), (main, IMAGE), ("0.seg.png", IMAGE), ("0.txt", b"a\ncaption"), ("1.jpg", IMAGE)]
        assert listed([*members, ("1.cls", b"5")][::order]) == (
            {main: 4, "1.jpg": 5},
            {"another image of a sample": 1},
        )


def test_masks_in_class_folders_belong_to_the_image_that_they_are_named_after(listed):
    assert listed({"a/0.seg.png": IMAGE, "a/0.jpg": IMAGE, "a/1.2.png": IMAGE, "a/1.jpg": IMAGE}) == (
        {"a/0.jpg": "a", "a/1.2.png": "a", "a/1.jpg": "a"},
        {"another image of a sample": 1},
    )


@pytest.mark.parametrize("names", [("0.jpg", "0.png"), ("0.left.jpg", "0.right.jpg"), ("0.input.jpg", "0.image.jpg")])
def test_two_images_for_one_class_are_refused_by_name(listed, names):
    with pytest.raises(DataError, match=f"{names[0]} and {names[1]} are both images of the sample 0; call the one"):
        listed([("0.cls", b"4"), *((name, IMAGE) for name in names)])


@pytest.mark.parametrize("name", ["a/0.jpg", "a/0.cls"])
def test_a_name_that_is_there_twice_is_refused(listed, name):
    with pytest.raises(DataError, match=f"some.tar: {name} is in it twice; write the archive anew"):
        listed([("a/0.jpg", IMAGE), ("a/0.cls", b"1"), (name, OTHER)])


@pytest.mark.parametrize(
    ("content", "label"),
    [
        (b"7", 7),
        (b" 12\n", 12),
        (b"tench", "tench"),
        (b"n01440764\r\n", "n01440764"),
        (b"\xef\xbb\xbf3", 3),
        ("Dürer".encode(), "Dürer"),
        (b"7up", "7up"),
        (b"great white shark", "great white shark"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("ending", ["cls", "CLS", "cls.txt", "txt"])
def test_a_class_is_a_number_or_a_name(listed, ending, content, label):
    assert listed({"0.jpg": IMAGE, f"0.{ending}": content}) == ({"0.jpg": label}, {})


@pytest.mark.parametrize(
    ("found", "label"),
    [
        ({"label": 3}, 3),
        ({"cls": "cat", "label": None}, "cat"),
        ({"class": 0}, 0),
        ({"class_id": 4.0}, 4),
        ({"label_name": "cat", "width": 3}, "cat"),
        ({"class_name": "cat"}, "cat"),
        ({"label": "12"}, 12),
        ({"label_name": "cat", "class_id": 1, "class": 2, "cls": 3, "label": 4}, 4),
        ({"label_name": "cat", "class_id": 1, "class": 2, "cls": 3}, 3),
        ({"label_name": "cat", "class_id": 1}, 1),
    ],
)  # fmt: skip
def test_json_gives_the_class_by_the_first_key_that_has_one(listed, found, label):
    assert listed({"0.jpg": IMAGE, "0.json": json.dumps(found).encode()})[0] == {"0.jpg": label}


def test_of_several_members_the_most_telling_gives_the_class(listed):
    by_value = {"0.txt": b"5", "a/x": b"", "0.json": b'{"label": 4}', "0.cls.txt": b"3", "0.cls": b"2"}
    members = {"0.jpg": IMAGE}
    for (name, content), label in zip(by_value.items(), (5, 5, 4, 3, 2)):
        members[name] = content
        assert listed(members)[0] == {"0.jpg": label}
        assert listed(list(members.items())[::-1])[0] == {"0.jpg": label}


def test_notes_and_data_beside_images_in_folders_are_no_classes(listed):
    members = {
        "a/0.jpg": IMAGE,
        "a/0.txt": b"a photo",
        "b/1.jpg": IMAGE,
        "b/1.json": b'{"width": 3}',
        "list.json": b"?",
    }
    assert listed(members)[0] == {"a/0.jpg": "a", "b/1.jpg": "b"}


@pytest.mark.parametrize("notes", [b"{", b'{"label": [1, 2]}', b'{"label": ' + b" " * (1 << 20) + b"3}"])
def test_json_that_gives_no_class_does_no_harm_in_class_folders(listed, notes):
    members = {"a/0.jpg": IMAGE, "a/0.json": notes, "b/1.jpg": IMAGE, "b/1.json": b'{"width": 3}'}
    assert listed(members)[0] == {"a/0.jpg": "a", "b/1.jpg": "b"}
    if len(notes) < 100:
        with pytest.raises(DataError, match=r"a/0.json (cannot be read|holds)"):
            listed(members | {"b/1.json": b'{"label": 3}'})


def test_where_members_hold_classes_folders_do_not(listed):
    assert listed({"train/0.jpg": IMAGE, "train/0.cls": b"2", "train/1.jpg": IMAGE, "train/2.cls": b"1"}) == (
        {"train/0.jpg": 2},
        {"no class": 1, "class without an image": 1},
    )


def test_a_class_may_have_the_whole_name_of_its_image(listed):
    assert listed({"i.0.jpg": IMAGE, "i.0.cls": b"0", "i.1.jpg": IMAGE, "i.1.cls": b"1"})[0] == {
        "i.0.jpg": 0,
        "i.1.jpg": 1,
    }


def test_a_part_of_a_data_set_is_no_class_but_a_train_may_be(listed):
    assert listed({"train/a.jpg": IMAGE, "bus/a.jpg": IMAGE})[0] == {"train/a.jpg": "train", "bus/a.jpg": "bus"}
    with pytest.raises(DataError, match="some.tar: train/a.jpg has no class, neither a member train/a.cls"):
        listed({"train/a.jpg": IMAGE})


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"0.cls": b"\xff\xfe"}, "0.cls begins with .* which is no UTF-8 text"),
        ({"0.cls": b"a\nb"}, "0.cls has 2 lines"),
        ({"0.cls": b"x" * 5000}, "0.cls is 5000 bytes long"),
        ({"0.cls": b""}, "0.jpg has no class"),
        ({"0.json": b"{"}, "0.json cannot be read as JSON"),
        ({"0.json": b"[" * 100_000}, "0.json cannot be read as JSON"),
        ({"0.json": b"\xff"}, "0.json cannot be read"),
        ({"0.json": b'{"label": [1, 2]}'}, r"0.json holds \[1, 2\]"),
        ({"0.json": b'{"label": 0.5}'}, "0.json holds 0.5"),
        ({"0.json": b'{"label": "' + b"x" * 5000 + b'"}'}, "0.json is 5000"),
        ({"0.json": b'{"label": "a\\nb"}'}, "0.json has 2 lines"),
        ({"0.json": b"3"}, "0.jpg has no class"),
    ],
)
def test_a_class_that_is_none_is_said(listed, members, said):
    with pytest.raises(DataError, match=said):
        listed({"0.jpg": IMAGE} | members)


def test_an_endless_class_number_is_a_name(listed):
    assert listed({"0.jpg": IMAGE, "0.cls": b"9" * 900})[0] == {"0.jpg": "9" * 900}


def test_what_systems_and_people_leave_in_tars_is_counted_and_left_out(listed):
    members = {"a/x.jpg": IMAGE, "a/._x.jpg": b"mac", "._a": b"mac", "a/.DS_Store": b"mac", "__MACOSX/a/x.jpg": IMAGE}
    members |= {"README": b"read me", "a/notes.md": b"", ".git/x.jpg": IMAGE, "a/deeper/.cache/x.jpg": IMAGE}
    assert listed(members) == ({"a/x.jpg": "a"}, {"hidden file": 6, "not an image": 2})


def test_nothing_but_other_files_is_said_with_their_number(listed):
    with pytest.raises(DataError, match=r"it holds no images \(not an image: 2, hidden file: 1\)"):
        listed({"a.md": b"", "b.md": b"", "._a": b""})


def test_links_stand_for_the_bytes_and_the_class_of_what_they_lead_to(tmp_path):
    hard, soft = tarfile.LNKTYPE, tarfile.SYMTYPE
    path = write_tar(
        tmp_path / "some.tar",
        [
            ("b/early.jpg", soft, "../a/x.jpg"),
            ("./a/x.jpg", IMAGE),
            ("b/y.jpg", hard, "./a/x.jpg"),
            ("c", soft, "a"),
            ("b/z.jpg", hard, "b/y.jpg"),
            ("b/gone.jpg", soft, "/data/x.jpg"),
            ("b/me.jpg", soft, "me.jpg"),
        ],
    )  # fmt: skip
    left_out = Counter()
    samples = read_index(path, left_out)
    assert [(s.name, s.label) for s in samples] == [
        *(("b/early.jpg", "b"), ("a/x.jpg", "a"), ("b/y.jpg", "b"), ("b/z.jpg", "b")),
    ]
    assert {path.read_bytes()[s.offset : s.offset + s.size] for s in samples} == {IMAGE}
    assert +left_out == {"link to nothing": 2, "not an image": 1}
    members = [("0.cls", b"7"), ("0.jpg", IMAGE), ("1.cls", hard, "0.cls"), ("1.jpg", hard, "0.jpg")]
    assert [s.label for s in read_index(write_tar(path, members))] == [7, 7]


def test_the_caller_learns_what_was_left_out(tmp_path):
    for part, count in (("train", 3), ("val", 1)):
        members = {f"{k}.jpg": IMAGE for k in range(count)} | {
            f"{k}.cls": b"%d" % k for k in range(count - (count > 1))
        }
        write_tar(tmp_path / f"{part}.tar", members | {"README": b"read me"})
    dataset = open_dataset(tmp_path)
    assert len(dataset.train) == 2
    assert dataset.train.records.left_out == {"no class": 1, "not an image": 1}
    assert dataset.test.records.left_out == {"not an image": 1}


# Data sets of several archives.


def test_missing_shards_are_named(tmp_path):
    for k in (0, 1, 3, 4, 7):
        write_tar(tmp_path / f"train-{k:03d}.tar", {f"a/{k}.jpg": IMAGE})
    write_tar(tmp_path / "val-00001-of-00003.tar", {"a/0.jpg": IMAGE})
    with pytest.warns(UserWarning) as warned:
        assert len(open_dataset(tmp_path).train) == 5
    said = sorted(str(warning.message) for warning in warned if "shards" in str(warning.message))
    assert [text.partition(": ")[2] for text in said] == [
        "train-002.tar and 2 more of 8 shards are missing; fetch what is missing or go on without its images.",
        "val-00000-of-00003.tar and 1 more of 3 shards are missing; fetch what is missing or go on without its images.",
    ]


def test_shards_without_gaps_raise_no_warning(tmp_path, recwarn):
    for name in ("train-2019.tar", "train-a-0.tar", "train-a-1.tar", "val-000001.tar", "val-000002.tar"):
        write_tar(tmp_path / name, {"a/0.jpg": IMAGE})
    open_dataset(tmp_path)
    assert not [str(warning.message) for warning in recwarn if "shards" in str(warning.message)]


@pytest.mark.parametrize("content", [b"", tar_bytes([])])
def test_an_empty_shard_is_named(tmp_path, content):
    for name in ("train-0.tar", "train-1.tar", "val-0.tar"):
        write_tar(tmp_path / name, {"a/0.jpg": IMAGE})
    (tmp_path / "train-1.tar").write_bytes(content)
    with pytest.raises(DataError, match="train-1.tar: it (is empty|holds no images)"):
        open_dataset(tmp_path)


@pytest.mark.parametrize("name", ["train.tar.gz", "train-0.tgz", "train/0.tar.zst", "train.tfrecord.gz"])
def test_compressed_archives_are_to_be_unpacked(tmp_path, name):
    write_tar(tmp_path / "val.tar", {"a/0.jpg": IMAGE})
    write_tar(tmp_path / name, {})
    with pytest.raises(DataError, match=f"{name} is compressed, and images are read in place: unpack it"):
        open_dataset(tmp_path)
    (tmp_path / "val.tar").unlink()
    with pytest.raises(DataError, match=f"{name} is compressed, and images are read in place: unpack it"):
        open_dataset(tmp_path)


@pytest.mark.parametrize("packer", ["gz", "bz2", "xz"])
def test_a_compressed_tar_is_known_by_its_content_too(tmp_path, packer):
    with tarfile.open(tmp_path / "train.tar", f"w:{packer}") as archive:
        archive.addfile(tarfile.TarInfo("a/x.jpg"))
    with pytest.raises(DataError, match="train.tar: it is compressed by (gzip|bzip2|xz), and images are read in place"):
        read_index(tmp_path / "train.tar")


def test_compressed_archives_beside_plain_ones_or_a_tree_do_no_harm(tmp_path, write_tree):
    for name in ("train.tar", "val.tar", "train.tar.gz", "val_boxes.tgz", "._train.tar"):
        write_tar(tmp_path / "plain" / name, {"a/0.jpg": IMAGE})
    assert len(open_dataset(tmp_path / "plain").train) == 1
    tree = write_tree()
    write_tar(tree / "train.tar.gz", {})
    write_tar(tree / "val.tar", {"0.jpg": IMAGE})
    assert len(open_dataset(tree).train) == 18


def test_an_archive_named_test_is_the_test_part_unless_it_has_no_classes(tmp_path):
    for part, label in (("train", "a"), ("val", "a"), ("test", "a")):
        write_tar(tmp_path / f"{part}.tar", {f"{label}/{part}.jpg": IMAGE, f"{label}/1.jpg": IMAGE})
    assert [path.name for path in open_dataset(tmp_path).test.paths] == ["test.jpg", "1.jpg"]
    write_tar(tmp_path / "test.tar", {"1.jpg": IMAGE})
    assert [path.name for path in open_dataset(tmp_path).test.paths] == ["val.jpg", "1.jpg"]


def test_archives_in_folders_count_only_where_none_lie_beside_them(tmp_path):
    for name in ("train.tar", "copy/train.tar", "val/0.tar", "val/1.tar"):
        write_tar(tmp_path / name, {"a/0.jpg": IMAGE})
    dataset = open_dataset(tmp_path)
    assert (len(dataset.train), len(dataset.test)) == (1, 2)


@pytest.mark.parametrize(
    ("labels", "said"),
    [([0, 2], "1 is missing"), ([1, 2, 4], "3 is missing"), ([2, 3], "2 is the first"), ([-3, 0], "-3 is the first")],
)
def test_class_numbers_leave_no_gaps(tmp_path, labels, said):
    for part in ("train", "val"):
        write_tar(tmp_path / f"{part}.tar", [m for k in labels for m in ((f"{k}.jpg", IMAGE), (f"{k}.cls", b"%d" % k))])
    with pytest.raises(DataError, match=rf"have gaps or begin elsewhere than at 0 or 1 \({said}\); number the classes"):
        open_dataset(tmp_path)


def test_class_numbers_begin_at_0_or_1(tmp_path):
    for first in (0, 1):
        labels = [b"%d" % (first + k) for k in (2, 0, 1)]
        for part in ("train", "val"):
            write_tar(
                tmp_path / f"{part}.tar",
                [m for k, label in enumerate(labels) for m in ((f"{k}.jpg", IMAGE), (f"{k}.cls", label))],
            )
        dataset = open_dataset(tmp_path)
        assert dataset.train.labels.tolist() == [2, 0, 1] and dataset.classes[0] == str(first)


def test_numbers_in_one_shard_and_names_in_another_are_refused(tmp_path):
    write_tar(tmp_path / "train-0.tar", {"0.jpg": IMAGE, "0.cls": b"0"})
    write_tar(tmp_path / "train-1.tar", {"a/0.jpg": IMAGE})
    write_tar(tmp_path / "val.tar", {"a/0.jpg": IMAGE})
    with pytest.raises(DataError, match=r"class number \(0\) and others the name of a class or of a folder \(a\)"):
        open_dataset(tmp_path)
    (tmp_path / "train-1.tar").unlink()
    with pytest.raises(DataError, match="Class a of .* test archives has no training images; name the classes of both"):
        open_dataset(tmp_path)


def test_tars_and_tfrecords_may_be_parts_of_one_set(tmp_path):
    write_tar(tmp_path / "train.tar", {"0.jpg": IMAGE, "0.cls": b"cat"})
    write_tfrecords(tmp_path / "val.tfrecord", [{"image": feature(IMAGE), "label_name": feature(b"cat")}])
    assert open_dataset(tmp_path).classes == ["cat"]
