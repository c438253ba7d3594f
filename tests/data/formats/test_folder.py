import shutil

import numpy as np
import pytest
from PIL import Image

from stablekd_fast.data import IMAGENET_MEAN, Augmentation, open_dataset
from stablekd_fast.data import split as split_module
from stablekd_fast.errors import ConfigError, DataError


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
        split_module, "decode_rgb", lambda content, path: opened.append(path) or original(content, path)
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
