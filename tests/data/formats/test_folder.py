import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from stablekd_fast.data import IMAGENET_MEAN, Augmentation, open_dataset
from stablekd_fast.data import split as split_module
from stablekd_fast.errors import ConfigError, DataError
from stablekd_fast.execution.memory import left


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def test_small_tree_is_resident(write_tree):
    root = write_tree(size=(12, 10))
    dataset = open_dataset(root)
    assert dataset.name == "tree"
    assert dataset.classes == ["ant", "bee", "cat"]
    assert dataset.mean == IMAGENET_MEAN
    assert dataset.augmentation == Augmentation("pad_crop", flip=True, padding=4)
    assert dataset.train.resident and dataset.train.images.shape == (18, 12, 10, 3)
    assert dataset.train.labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert len(dataset.test) == 6
    for path, image in zip(dataset.train.paths, dataset.train.images, strict=True):
        assert np.array_equal(image, pixels(path))
    assert dataset.train.paths[7] == root / "train" / "bee" / "001.png"


def test_val_folder_upper_case_suffix_and_nesting_are_found(write_tree, tmp_path):
    write_tree(suffix="PNG", test_folder="val", root=tmp_path / "outer" / "flowers")
    dataset = open_dataset(tmp_path / "outer")
    assert dataset.name == "flowers"
    assert (len(dataset.train), len(dataset.test)) == (18, 6)


def test_unlabelled_test_folder_gives_way_to_val(write_tree):
    root = write_tree(test_folder="val")
    (root / "test").mkdir()
    shutil.copy(root / "val" / "ant" / "000.png", root / "test" / "0.png")
    assert len(open_dataset(root).test) == 6


def test_hidden_and_foreign_files_are_no_images(write_tree):
    root = write_tree()
    (root / "train" / ".cache").mkdir()
    (root / "train" / "ant" / "._000.png").write_bytes(b"resource fork")
    (root / "train" / "ant" / "Thumbs.db").write_bytes(b"thumbs")
    nested = root / "train" / "ant" / "images"
    nested.mkdir()
    shutil.copy(root / "train" / "ant" / "000.png", nested)
    dataset = open_dataset(root)
    assert dataset.classes == ["ant", "bee", "cat"]
    assert dataset.train.labels.bincount().tolist() == [7, 6, 6]


def test_only_the_subset_is_decoded(write_tree, monkeypatch):
    part = open_dataset(write_tree()).train.subset(6, seed=0)
    opened = []
    original = split_module.decode_rgb
    monkeypatch.setattr(
        split_module, "decode_rgb", lambda content, path, header: opened.append(path) or original(content, path, header)
    )
    assert len(part) == 6 and part.labels.bincount().tolist() == [2, 2, 2]
    assert not opened
    assert part.images.shape == (6, 12, 12, 3)
    _ = part.images  # once more
    assert sorted(opened) == part.paths
    assert all(np.array_equal(image, pixels(path)) for image, path in zip(part.images, part.paths))


def test_image_size_resizes_small_images(write_tree):
    root = write_tree(size=(12, 12))
    Image.new("RGB", (20, 9), (1, 2, 3)).save(root / "train" / "ant" / "000.png")
    images = open_dataset(root, image_size=8).train.images
    assert images.shape == (18, 8, 8, 3)
    assert (images[0].numpy() == (1, 2, 3)).all()


def test_large_tree_is_read_at_its_crop_size(write_large_tree):
    root = write_large_tree()
    by_default, chosen = open_dataset(root), open_dataset(root, image_size=48)
    assert not by_default.train.resident
    assert by_default.augmentation == Augmentation("resized_crop", flip=True, size=224)
    assert chosen.augmentation.size == chosen.test.crop_size == 48


def test_missing_path_says_what_can_be_given(tmp_path):
    with pytest.raises(DataError, match="no data set at .*nowhere.*digits"):
        open_dataset(tmp_path / "nowhere")


def test_folder_without_train(tmp_path):
    (tmp_path / "pictures").mkdir()
    with pytest.raises(DataError, match="no train folder"):
        open_dataset(tmp_path)


def test_train_without_class_folders(write_tree):
    root = write_tree()
    shutil.rmtree(root / "train")
    (root / "train").mkdir()
    with pytest.raises(DataError, match="holds no class folders"):
        open_dataset(root)


def test_no_test_images(write_tree):
    root = write_tree()
    shutil.rmtree(root / "test")
    with pytest.raises(DataError, match="no test images"):
        open_dataset(root)


def test_a_class_without_images_is_named(write_tree):
    """Without training images there is no class; without test images it is not measured, which is said."""
    root = write_tree()
    for part in ("test", "train"):
        for path in (root / part / "bee").iterdir():
            path.rename(path.with_suffix(".png.part"))
        if part == "test":
            with pytest.warns(UserWarning, match="test/bee holds no images"):
                assert open_dataset(root).test.labels.bincount().tolist() == [2, 0, 2]
    with pytest.raises(DataError, match=r"train/bee holds no images.*6 files named \*.part that hold images"):
        open_dataset(root)


def test_differing_classes_are_listed(write_tree):
    root = write_tree()
    (root / "test" / "bee").rename(root / "test" / "wasp")
    with pytest.raises(DataError, match="train has bee; only .*test has wasp"):
        open_dataset(root)


def test_small_images_of_two_sizes_need_an_image_size(write_tree):
    root = write_tree()
    for number in range(3):
        for name in ("ant", "bee", "cat"):
            Image.new("RGB", (20, 20)).save(root / "train" / name / f"00{number}.png")
    with pytest.raises(DataError, match="(12 x 12, 20 x 20|20 x 20, 12 x 12).*image size"):
        open_dataset(root)


def test_one_image_of_another_size_is_named(write_tree):
    root = write_tree()
    Image.new("RGB", (20, 9)).save(root / "train" / "bee" / "003.png")
    with pytest.raises(DataError, match="bee/003.png: it is 20 x 9 pixels and others are 12 x 12"):
        _ = open_dataset(root).train.images


def damage(path, how: str) -> None:
    path.write_bytes({"empty": b"", "foreign": b"GIF? no", "truncated": path.read_bytes()[:-150]}[how])


@pytest.mark.parametrize("how", ["empty", "foreign", "truncated"])
def test_bad_image_stops_with_its_name(write_tree, how):
    root = write_tree()
    damage(root / "train" / "bee" / "004.png", how)
    with pytest.raises(DataError, match="bee/004.png"):
        _ = open_dataset(root).train.images


@pytest.mark.parametrize("how", ["empty", "foreign", "truncated"])
def test_bad_image_is_skipped_and_counted(write_tree, how):
    root = write_tree()
    bad = root / "train" / "bee" / "004.png"
    damage(bad, how)
    train = open_dataset(root, on_bad_image="skip").train
    assert len(train) == len(train.labels) == len(train.images) == 17
    assert train.sample_ids.tolist() == [sample for sample in range(18) if sample != 10]
    assert [path for path, _ in train.skipped] == [bad]
    assert bad not in train.paths
    assert all(np.array_equal(image, pixels(path)) for image, path in zip(train.images, train.paths, strict=True))


def test_bad_first_image_of_a_class_is_skipped(write_tree):
    root = write_tree()
    damage(root / "train" / "ant" / "000.png", "empty")
    with pytest.raises(DataError, match="ant/000.png: the file is empty"):
        _ = open_dataset(root).train.images
    assert len(open_dataset(root, on_bad_image="skip").train) == 17


def test_nothing_but_bad_images(write_tree):
    root = write_tree()
    for path in (root / "test").rglob("*.png"):
        damage(path, "empty")
    with pytest.raises(DataError, match="None of 6 images"):
        len(open_dataset(root, on_bad_image="skip").test)
    for path in (root / "train").rglob("*.png"):
        damage(path, "empty")
    with pytest.raises(DataError, match="None of 18 training images"):
        open_dataset(root, on_bad_image="skip")


def test_unknown_settings_are_refused(write_tree):
    root = write_tree()
    with pytest.raises(ConfigError, match="on_bad_image"):
        open_dataset(root, on_bad_image="ignore")
    with pytest.raises(ConfigError, match="image size"):
        open_dataset(root, image_size=0)


@pytest.mark.parametrize("fields", [dict(kind="cutout"), dict(kind="pad_crop", padding=-1), dict(kind="resized_crop")])
def test_impossible_augmentation_is_refused(fields):
    with pytest.raises(ConfigError):
        Augmentation(flip=True, **fields)


def test_images_of_64_pixels_are_small_and_those_of_65_are_not(write_tree, tmp_path):
    """Small ones are kept in memory at their own size; the longer side decides."""
    edge = open_dataset(write_tree(size=(40, 64)))
    assert edge.train.resident and edge.train.images.shape[1:] == (40, 64, 3)
    assert not open_dataset(write_tree(size=(40, 65), root=tmp_path / "larger")).train.resident


def copied(root, place, *names):
    for name in names:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / "train" / "ant" / "000.png", place / name)


def test_what_is_not_used_is_counted_by_reason(write_tree):
    root = write_tree()
    ant = root / "train" / "ant"
    copied(
        root, ant, "._0.png", "@eaDir/SYNO.png", "__MACOSX/x.png", "Thumbs.db", "no_ending", "photo.heic", "page.eps"
    )
    (ant / "notes.txt").write_text("notes")
    (ant / "gone.raw").symlink_to("/nowhere")
    copied(root, root / "train", "loose.png", "lost+found/x.png", ".git/x.png")
    with pytest.warns(UserWarning, match=r"Not used: .*files named \*\.heic that hold images.*photo.heic"):
        dataset = open_dataset(root)
    assert dataset.classes == ["ant", "bee", "cat"] and len(dataset.train) == 18
    assert dataset.left_out == {
        "hidden files and folders": 4,
        "files beside the class folders": 1,
        "files named *.eps that hold images; name them by their format to have them used": 1,
        "files named *.heic that hold images; name them by their format to have them used": 1,
        "files named *.txt": 1,
        "files without an ending that hold images; name them by their format to have them used": 1,
        "links that lead nowhere": 1,
    }


def test_endings_are_known_in_any_case_and_programs_of_postscript_are_never_run(write_tree):
    root = write_tree()
    ant = root / "train" / "ant"
    picture = Image.open(ant / "000.png").convert("RGB")
    for ending, form in (
        ("JFIF", "JPEG"), ("jpe", "JPEG"), ("Tga", "TGA"), ("jp2", "JPEG2000"), ("AVIF", "AVIF"), ("tiff", "TIFF"),
    ):  # fmt: skip
        picture.save(ant / f"x.{ending}", form)
    assert open_dataset(root).train.labels.bincount().tolist() == [12, 6, 6]
    picture.save(root / "program.eps")
    shutil.move(root / "program.eps", ant / "000.png")
    with pytest.raises(DataError, match="ant/000.png: it is not an image of a known format"):
        _ = open_dataset(root).train.images


def test_links_are_followed_once(write_tree):
    root = write_tree()
    (root / "train" / "ant" / "loop").symlink_to(root / "train" / "ant", target_is_directory=True)
    (root / "train" / "ant" / "other").symlink_to(root / "test" / "bee", target_is_directory=True)
    (root / "train" / "bee" / "9.png").symlink_to(root / "test" / "cat" / "000.png")
    (root / "train" / "cat" / "9.png").symlink_to("/nowhere.png")
    dataset = open_dataset(root, on_bad_image="skip")
    assert dataset.left_out == {"links to a folder above them": 1}
    assert dataset.train.labels.bincount().tolist() == [8, 7, 6]
    assert [path.name for path, _ in dataset.train.skipped] == ["9.png"]


@pytest.mark.parametrize(
    "names", [("Train", "VAL"), ("training", "validation"), ("TRAIN", "Testing"), ("train", "dev")]
)
def test_the_parts_have_other_names_too(write_tree, names):
    root = write_tree()
    (root / "train").rename(root / "x")
    (root / "x").rename(root / names[0])
    (root / "test").rename(root / "y")
    (root / "y").rename(root / names[1])
    dataset = open_dataset(root)
    assert (len(dataset.train), len(dataset.test), dataset.validation) == (18, 6, None) and dataset.notes == []


def test_three_parts_are_three_parts(write_tree):
    root = write_tree()
    shutil.copytree(root / "test", root / "valid")
    shutil.rmtree(root / "valid" / "cat")
    with pytest.warns(UserWarning, match="valid is held out.*test is the test"):
        dataset = open_dataset(root)
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (18, 4, 6)
    assert any("valid has no images of cat: 1 classes" in note for note in dataset.notes)


@pytest.mark.parametrize("layout", ["flat", "one folder"])
def test_a_test_folder_without_classes_is_said_not_to_be_used(write_tree, layout):
    root = write_tree(test_folder="val")
    copied(root, root / "test" / ("" if layout == "flat" else "unknown"), "1.png", "2.png")
    with pytest.warns(UserWarning, match="test is not used: it holds none of the 3 class folders"):
        dataset = open_dataset(root)
    assert len(dataset.test) == 6 and dataset.validation is None


@pytest.mark.parametrize("left", ["train.tar", "ILSVRC2012_img_train.tar"])
def test_archives_beside_folders_are_left_alone(write_tree, left):
    root = write_tree()
    (root / left).write_bytes(b"")
    with pytest.warns(UserWarning, match=f"{left} is not used"):
        assert len(open_dataset(root).train) == 18


def test_names_that_are_no_utf8_are_read_and_shown(write_tree):
    root = write_tree()
    name = os.fsencode(root / "train" / "ant") + b"/caf\xe9.png"
    shutil.copy(root / "train" / "ant" / "000.png", name)
    dataset = open_dataset(root)
    assert len(dataset.train) == 19 and len(dataset.train.identity()["digest"]) == 32
    with open(name, "wb"):
        pass
    with pytest.raises(DataError, match=r"caf\\xe9.png: the file is empty") as caught:
        _ = open_dataset(root).train.images
    str(caught.value).encode()
    os.rename(os.fsencode(root / "train" / "cat"), os.fsencode(root / "train") + b"/c\xe4t")
    os.rename(os.fsencode(root / "test" / "cat"), os.fsencode(root / "test") + b"/c\xe4t")
    assert open_dataset(root, on_bad_image="skip").classes[2] == r"c\xe4t"


def test_one_odd_image_does_not_decide_for_all(write_tree):
    root = write_tree(size=(48, 48))
    Image.new("RGB", (640, 480)).save(root / "train" / "ant" / "000.png")
    with pytest.warns(UserWarning, match="17 of 18 training images .* up to 64 pixels on both sides, .* as the small"):
        assert open_dataset(root, image_size=32).train.resident
    large = write_tree(size=(80, 90), root=root.with_name("large"))
    Image.new("RGB", (20, 20)).save(large / "train" / "ant" / "000.png")
    with pytest.warns(UserWarning, match="1 of 18 training images .*as the large"):
        assert not open_dataset(large).train.resident


def test_small_images_that_are_to_be_large_are_not_blown_up_in_memory(write_tree):
    root = write_tree()
    assert open_dataset(root, image_size=64).train.resident
    dataset = open_dataset(root, image_size=65)
    assert not dataset.train.resident and dataset.augmentation.size == 65


def test_memory_is_counted_before_it_is_filled(write_tree, monkeypatch):
    root = write_tree()
    monkeypatch.setattr(split_module, "left", lambda device: 18 * 12 * 12 * 3)
    assert len(open_dataset(root).train.images) == 18
    monkeypatch.setattr(split_module, "left", lambda device: 18 * 12 * 12 * 3 - 1)
    with pytest.raises(DataError, match="18 images of 12 x 12 pixels take 0.0 GB in the memory of cpu, of which"):
        _ = open_dataset(root).train.images
    assert len(open_dataset(root).train.subset(6, 0).images) == 6


def test_memory_that_is_left_is_told_by_the_system():
    there = left(torch.device("cpu"))
    assert there is not None and 2**20 < there < 2**50
