"""Images without labels: folders of anything, lists of paths, tars, and several sources at once."""

import io
import os
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from stablekd_fast.data import Augmentation, EvalSource, TrainSource, open_dataset
from stablekd_fast.data.decoders import pick_source
from stablekd_fast.data.records import FileRecords, JoinedRecords
from stablekd_fast.errors import DataError

STATISTICS = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def encoded(seed, side=12, kind="PNG"):
    content = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(content, kind)
    return content.getvalue()


def write(path, seed, side=12):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(seed, side))
    return path


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def photos(tmp_path):
    """30 images at three depths."""
    for number in range(30):
        write(tmp_path / "photos" / ("" if number % 3 else "summer/2021") / f"{number:02}.png", number)
    return tmp_path / "photos"


def names(dataset):
    return sorted(path.name for split in (dataset.train, dataset.test) for path in split.paths)


def test_a_folder_of_anything_is_images_without_labels(photos):
    with pytest.warns(UserWarning, match="photos: 30 images without labels"):
        dataset = open_dataset(photos)
    assert dataset.classes == [] and not dataset.train.labelled and not dataset.test.labelled
    assert dataset.train.labels.shape == (29, 0) and len(dataset.test) == 1
    assert names(dataset) == [f"{number:02}.png" for number in range(30)]
    assert "There is no test split: 1 of 30 images are held out as one." in dataset.notes
    assert dataset.train.images.shape == (29, 12, 12, 3)


def test_the_held_out_part_follows_from_names_and_not_from_what_was_added(photos, tmp_path):
    first = open_dataset(photos).test.paths
    shutil.copytree(photos, tmp_path / "moved")
    assert [path.name for path in open_dataset(tmp_path / "moved").test.paths] == [path.name for path in first]
    for number in range(30, 50):
        write(photos / "more" / f"{number}.png", number)
    assert len(open_dataset(photos).test) == 2


def test_no_loss_can_take_absent_labels_for_classes(photos):
    batch = next(
        TrainSource(open_dataset(photos).train, Augmentation("pad_crop", flip=True), *STATISTICS, batch_size=4, seed=0)
        .batches(0, 1)
    )  # fmt: skip
    assert len(batch.labels) == 4
    logits = torch.zeros(4, 3)
    for use in (
        lambda: torch.nn.functional.cross_entropy(logits, batch.labels),
        lambda: logits.argmax(1) == batch.labels[:, 0],
    ):
        with pytest.raises((RuntimeError, IndexError)):
            use()
    assert logits.gather(1, batch.labels).mean().isnan()  # which ends a run


def test_parts_of_a_split_without_labels_are_drawn_by_their_names_alone(photos):
    train = open_dataset(photos).train
    rest, held_out = train.holdout(5, seed=1)
    assert (len(rest), len(held_out), len(train.subset(0.5, seed=0))) == (24, 5, 14)
    assert not set(rest.sample_ids.tolist()) & set(held_out.sample_ids.tolist())
    assert not held_out.labelled and held_out.labels.shape == (5, 0)


def test_identity_is_by_content(photos, tmp_path):
    before = open_dataset(photos).train.identity()
    assert open_dataset(photos).train.identity() == before
    shutil.copytree(photos, tmp_path / "moved")
    assert open_dataset(tmp_path / "moved").train.identity() == before
    write(open_dataset(photos).train.paths[0], 99)
    assert open_dataset(photos).train.identity() != before


def test_what_is_no_image_is_left_out_and_told(photos):
    (photos / ".cache").mkdir()
    write(photos / ".cache" / "a.png", 0)
    (photos / "notes.txt").write_text("hello")
    (photos / "gone.png.bak").symlink_to("nowhere")
    (photos / "round").symlink_to(photos)
    (photos / "link.png").symlink_to(photos / "01.png")
    dataset = open_dataset(photos)
    assert names(dataset).count("link.png") == 1 and len(names(dataset)) == 31
    assert dataset.left_out == {
        "hidden files and folders": 1,
        "files named *.txt": 1,
        "links that lead nowhere": 1,
        "links to a folder above them": 1,
    }


def test_damaged_images_stop_or_are_skipped(photos):
    bad = open_dataset(photos).train.paths[3]
    bad.write_bytes(bad.read_bytes()[:40])
    with pytest.raises(DataError, match=bad.name):
        _ = open_dataset(photos).train.images
    train = open_dataset(photos, on_bad_image="skip").train
    assert len(train) == 28 and [path for path, _ in train.skipped] == [bad] and train.labels.shape == (28, 0)


def test_a_flat_train_folder_keeps_its_test_images(tmp_path):
    for number in range(8):
        write(tmp_path / "set" / ("train" if number < 6 else "val") / f"{number}.png", number)
    write(tmp_path / "set" / "drafts" / "9.png", 9)
    dataset = open_dataset(tmp_path / "set")
    assert (len(dataset.train), len(dataset.test)) == (6, 2) and not dataset.train.labelled
    assert any("only train and val are read, not drafts" in note for note in dataset.notes)


def test_a_list_names_images_folders_and_tars(photos, tmp_path):
    write_tar(tmp_path / "more.tar", {"a/x.png": encoded(70), "a/y.png": encoded(71)})
    listed = tmp_path / "lists" / "mine.txt"
    listed.parent.mkdir()
    lines = [
        "# mine",
        "",
        "../photos/01.png",
        f"{photos}/02.png",
        "../photos/01.png",
        "../photos/summer",
        "../more.tar",
    ]
    listed.write_text("\n".join([*lines, "../photos/01.png 3"]))
    dataset = open_dataset(listed)
    assert names(dataset) == sorted(
        ["01.png", "02.png", "x.png", "y.png", *(f"{number:02}.png" for number in range(0, 30, 3))]
    )
    assert any("1 images of" in note and "named twice" in note for note in dataset.notes)
    assert dataset.left_out == {"lines that name no image, folder or tar": 1}


def test_an_image_that_a_list_names_twice_is_used_once(photos, tmp_path):
    (tmp_path / "list.txt").write_text("photos/01.png\nphotos/02.png\nphotos/../photos/01.png\nphotos/04.png\n")
    dataset = open_dataset(tmp_path / "list.txt")
    assert names(dataset) == ["01.png", "02.png", "04.png"]
    assert any("1 images of" in note and "named twice" in note for note in dataset.notes)


def test_one_image_is_too_few(tmp_path):
    write(tmp_path / "few" / "a.png", 1)
    with pytest.raises(DataError, match="few holds 1 image; at least 2 are needed"):
        open_dataset(tmp_path / "few")


@pytest.mark.parametrize("content", ["", "# nothing\n", "a.jpg 3\nb.jpg 4\n"])
def test_a_list_without_images_is_refused(tmp_path, content):
    (tmp_path / "list.txt").write_text(content)
    with pytest.raises(DataError, match="names no images"):
        open_dataset(tmp_path / "list.txt")


@pytest.mark.parametrize(("content", "said"), [(b"\xff\xfe.png\n", "no UTF-8"), (b"a\0.png\n", "NUL")])
def test_a_list_that_is_no_text_is_refused(tmp_path, content, said):
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(DataError, match=said):
        open_dataset(tmp_path / "list.txt")


def test_images_of_a_list_that_are_not_there_are_bad_images(photos, tmp_path):
    (tmp_path / "list.txt").write_text("\n".join(f"photos/{number:02}.png" for number in range(1, 30)))
    dataset = open_dataset(tmp_path / "list.txt", on_bad_image="skip")  # every third lies elsewhere
    assert len(dataset.train) + len(dataset.test.skipping()) == 20
    with pytest.raises(DataError, match="No such file"):
        _ = open_dataset(tmp_path / "list.txt").train.images


def test_tars_without_labels(tmp_path):
    for shard in range(2):
        write_tar(
            tmp_path / "tars" / f"shard-{shard}.tar",
            {f"{shard}{number}.png": encoded(10 * shard + number) for number in range(6)} | {"a.json": b'{"w": 3}'},
        )
    dataset = open_dataset(tmp_path / "tars")
    assert len(dataset.train) == 11 and len(dataset.test) == 1 and not dataset.train.labelled
    single = open_dataset(tmp_path / "tars" / "shard-0.tar")
    assert names(single) == [f"0{number}.png" for number in range(6)]


def test_tars_of_two_parts_without_labels_say_what_would_give_them(tmp_path):
    for part, count in (("train", 5), ("val", 2)):
        write_tar(tmp_path / "set" / f"{part}.tar", {f"{part}{number}.png": encoded(number) for number in range(count)})
    dataset = open_dataset(tmp_path / "set")
    assert (len(dataset.train), len(dataset.test)) == (5, 2) and not dataset.test.labelled
    assert any("no member" in note or "neither a member" in note for note in dataset.notes)


def test_labels_of_a_single_tar_are_not_dropped_in_silence(tmp_path):
    members = {f"{number}.{ending}": content for number in range(4) for ending, content in
               (("png", encoded(number)), ("cls", b"%d" % (number % 2)))}  # fmt: skip
    dataset = open_dataset(write_tar(tmp_path / "one.tar", members))
    assert any("The classes that" in note and "are not used" in note for note in dataset.notes)
    (tmp_path / "set").mkdir()
    shutil.copy(tmp_path / "one.tar", tmp_path / "set" / "train.tar")
    with pytest.raises(DataError, match="none named test"):
        open_dataset(tmp_path / "set")


def test_several_sources_are_one_data_set(photos, tmp_path):
    for number in range(10):
        write(tmp_path / "other" / f"{number:02}.png", 100 + number)
    write_tar(tmp_path / "more.tar", {"x.png": encoded(70)})
    sources = [photos, tmp_path / "other", tmp_path / "more.tar"]
    dataset = open_dataset(",".join(map(str, sources)))
    assert dataset.name == "photos, other, more.tar" and len(dataset.train) + len(dataset.test) == 41
    assert names(open_dataset(sources)) == names(dataset)
    for path, image in zip(dataset.train.paths, dataset.train.images, strict=True):
        if path.parent.suffix != ".tar":
            assert np.array_equal(image, np.asarray(Image.open(path)))
    shutil.copytree(tmp_path / "other", tmp_path / "elsewhere" / "other")
    moved = open_dataset([photos, tmp_path / "elsewhere" / "other", tmp_path / "more.tar"])
    assert moved.train.identity() == dataset.train.identity()


def test_a_path_with_a_comma_is_a_path(photos, tmp_path):
    photos.rename(tmp_path / "mine, and yours")
    assert len(names(open_dataset(str(tmp_path / "mine, and yours")))) == 30


def test_an_image_in_two_sources_is_used_once(photos):
    dataset = open_dataset([photos, photos / "summer"])
    assert len(names(dataset)) == 30 and any("10 train images are in several sources" in n for n in dataset.notes)


def test_an_image_to_test_on_is_not_trained_on(write_tree):
    root = write_tree()
    with pytest.raises(DataError, match="6 test images are training images of another source"):
        open_dataset([root, root / "test"])


def test_labels_are_kept_where_all_sources_have_the_same_classes(write_tree, tmp_path):
    one, other = write_tree(), write_tree(root=tmp_path / "second")
    dataset = open_dataset([one, other])
    assert dataset.train.labels.bincount().tolist() == [12, 12, 12] and len(dataset.test) == 12
    assert dataset.classes == ["ant", "bee", "cat"]
    for path, label in zip(dataset.train.paths, dataset.train.labels.tolist(), strict=True):
        assert path.parent.name == dataset.classes[label]


def test_unlabelled_images_join_labelled_ones_which_stay_the_test(write_tree, photos):
    root = write_tree()
    dataset = open_dataset([root, photos])
    assert len(dataset.train) == 48 and not dataset.train.labelled
    assert dataset.test.labelled and len(dataset.test) == 6 and dataset.classes == ["ant", "bee", "cat"]
    assert any("labels of the training images of" in note and "are not used" in note for note in dataset.notes)


def test_test_images_without_labels_give_way_to_those_with_some(write_tree, tmp_path):
    for number in range(8):
        write(tmp_path / "flat" / ("train" if number < 6 else "test") / f"{number}.png", number)
    dataset = open_dataset([write_tree(), tmp_path / "flat"])
    assert len(dataset.train) == 24 and len(dataset.test) == 6 and dataset.test.labelled
    assert any("Of the test images those of" in note and "flat are not used" in note for note in dataset.notes)


def test_sources_of_other_classes_have_no_labels_together(write_tree, tmp_path):
    other = write_tree(root=tmp_path / "second")
    for part in ("train", "test"):
        (other / part / "ant").rename(other / part / "dog")
    dataset = open_dataset([write_tree(), other])
    assert dataset.classes == [] and not dataset.train.labelled and not dataset.test.labelled
    assert any("No labels are used: the classes of" in note for note in dataset.notes)


@pytest.mark.parametrize("other", ["digits", "own.npz"])
def test_arrays_do_not_go_with_files(photos, tmp_path, other):
    np.savez(tmp_path / "own.npz", x=np.zeros(1))
    with pytest.raises(DataError, match="among several data sets"):
        open_dataset([photos, other if other == "digits" else tmp_path / other])


@pytest.mark.parametrize("source", ["torchvision", pytest.param("dali", marks=pytest.mark.dali),
                                    pytest.param("dali-stream", marks=pytest.mark.dali)])  # fmt: skip
def test_large_images_of_several_sources_are_read_by_every_source(tmp_path, source):
    from stablekd_fast.data import StreamSource

    for number in range(8):
        write(tmp_path / "ab"[number % 2] / f"{number}.png", number, side=90)
    dataset = open_dataset([tmp_path / "a", tmp_path / "b"], image_size=72)
    assert isinstance(dataset.train.records, JoinedRecords)
    train = TrainSource(
        dataset.train, dataset.augmentation, *STATISTICS, batch_size=3, seed=0,
        source="auto" if source == "dali-stream" else source, workers=1,
    )  # fmt: skip
    stream = StreamSource(train) if source == "dali-stream" else train
    batches = list(stream.batches(0, 2))
    assert all(batch.pixels.shape == (3, 3, 72, 72) and batch.labels.shape == (3, 0) for batch in batches)


def test_sources_are_taken_in_their_order(photos):
    paths = sorted(photos.rglob("*.png"))
    records = JoinedRecords([FileRecords.of(paths[:4]), FileRecords.of(paths[4:9])])
    assert [records.name(number) for number in range(9)] == paths[:9]
    part = records.taken([1, 3, 4, 8])
    assert [part.name(number) for number in range(4)] == [paths[1], paths[3], paths[4], paths[8]]
    assert part.read(2) == paths[4].read_bytes() and part.stamp(3)[0] == os.stat(paths[8]).st_size
    with pytest.raises(ValueError, match="order of the sources"):
        records.taken([8, 1])


def test_labels_may_be_those_that_somebody_gives(photos):
    asked = []

    def answer(images):
        asked.append(len(images))
        return torch.arange(len(images))

    test = open_dataset(photos).train
    plain = EvalSource(test, *STATISTICS, batch_size=16)
    given = plain.labelled_by(answer)
    assert (plain.truth, given.truth) == ("labels", "teacher")
    for _ in range(2):
        assert [batch.labels.tolist() for batch in given.batches()] == [list(range(16)), list(range(13))]
    assert asked == [16, 13] and next(plain.batches()).labels.shape == (16, 0)


def test_pick_source_reads_joined_images(tmp_path):
    for number in range(4):
        write(tmp_path / "ab"[number % 2] / f"{number}.png", number, side=90)
    train = open_dataset([tmp_path / "a", tmp_path / "b"]).train
    assert pick_source("torchvision", train, torch.device("cpu")).name == "torchvision"
