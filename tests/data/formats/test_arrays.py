import gzip
import struct

import numpy as np
import pytest
from PIL import Image

from stablekd_fast.data import open_dataset
from stablekd_fast.errors import DataError

RNG = np.random.default_rng(0)

DIGITS_TEST_START = [1, 5, 6, 7, 1, 5, 3, 0, 7, 6, 3, 2]


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def write_idx(tmp_path):
    """Writes MNIST's four files and returns their folder and arrays by name."""

    def write(folder="MNIST", separator="-", packed=True):
        root = tmp_path / folder / "raw"
        root.mkdir(parents=True)
        arrays = {}
        for part, count in (("train", 30), ("t10k", 20)):
            arrays[f"{part}-images{separator}idx3-ubyte"] = RNG.integers(0, 256, (count, 28, 28), dtype=np.uint8)
            arrays[f"{part}-labels{separator}idx1-ubyte"] = np.arange(count, dtype=np.uint8) % 10
        for name, array in arrays.items():
            if packed:
                (root / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
            else:
                (root / name).write_bytes(idx(array))
        return root, arrays

    return write


def test_digits_have_their_fixed_split():
    dataset = open_dataset("digits")
    assert (dataset.name, dataset.classes) == ("digits", list("0123456789"))
    assert (len(dataset.train), len(dataset.test)) == (1438, 359)
    assert dataset.train.sample_ids.tolist() == list(range(1438))
    assert dataset.train.labels.bincount().tolist() == [142, 146, 142, 146, 145, 146, 145, 143, 139, 144]
    assert not dataset.augmentation.flip and dataset.augmentation.padding == 1
    # Pins which images are in the test split: another split would make results incomparable.
    assert dataset.test.labels[:12].tolist() == DIGITS_TEST_START
    assert dataset.train.images.max() == 255
    pixels = dataset.train.images.double() / 255
    assert abs(pixels.mean() - dataset.mean[0]) < 2e-3 and abs(pixels.std() - dataset.std[0]) < 2e-3
    assert (dataset.train.images[..., :1] == dataset.train.images).all()


@pytest.mark.parametrize("separator", ["-", "."])
@pytest.mark.parametrize("packed", [True, False])
def test_mnist_files(write_idx, separator, packed):
    root, arrays = write_idx(separator=separator, packed=packed)
    dataset = open_dataset(root)
    assert (dataset.name, dataset.augmentation.flip, dataset.augmentation.padding) == ("mnist", False, 2)
    assert dataset.mean == (0.1307,) * 3
    images = arrays[f"train-images{separator}idx3-ubyte"]
    assert np.array_equal(dataset.train.images.numpy(), np.repeat(images[..., None], 3, axis=3))
    assert dataset.test.labels.tolist() == [number % 10 for number in range(20)]


def test_fashion_mnist_is_known_by_its_folder(write_idx):
    dataset = open_dataset(write_idx(folder="FashionMNIST")[0])
    assert dataset.name == "fashion-mnist" and dataset.augmentation.flip
    assert dataset.classes[7] == "sneaker"


def test_resident_images_can_be_resized(write_idx):
    root, arrays = write_idx()
    images = open_dataset(root, image_size=14).train.images
    assert images.shape == (30, 14, 14, 3)
    first = Image.fromarray(arrays["train-images-idx3-ubyte"][0]).resize((14, 14), Image.Resampling.BILINEAR)
    assert np.array_equal(images[0, :, :, 0], np.asarray(first))
    with pytest.raises(DataError, match="at most 64 pixels, got 224"):
        open_dataset(root, image_size=224)


def test_missing_idx_file_is_named(write_idx):
    root, _ = write_idx()
    (root / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match="lacks the idx files t10k-labels"):
        open_dataset(root)


@pytest.mark.parametrize(
    "content, message",
    [
        (lambda array: gzip.compress(idx(array))[:-30], "Cannot read"),
        (lambda array: b"<html>not found</html>", "Cannot read"),
        (lambda array: gzip.compress(b"<html>not found</html>"), "not an idx file"),
        (lambda array: gzip.compress(idx(array)[:-5]), "announces"),
        (lambda array: gzip.compress(idx(array[..., 0])), "not an idx file"),
    ],
)
def test_damaged_idx_file_is_named(write_idx, content, message):
    root, arrays = write_idx()
    (root / "train-images-idx3-ubyte.gz").write_bytes(content(arrays["train-images-idx3-ubyte"]))
    with pytest.raises(DataError, match=message) as error:
        open_dataset(root)
    assert "train-images-idx3-ubyte.gz" in str(error.value)


def test_idx_labels_out_of_range(write_idx):
    root, arrays = write_idx()
    labels = arrays["train-labels-idx1-ubyte"].copy()
    labels[4] = 10
    (root / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    with pytest.raises(DataError, match="label 10 of image 4 is out of range.*0 to 9"):
        open_dataset(root)


def npz_arrays(**changes) -> dict[str, np.ndarray]:
    arrays = dict(
        x_train=RNG.integers(0, 256, (12, 9, 7, 3), dtype=np.uint8),
        y_train=np.arange(12) % 4,
        x_test=RNG.integers(0, 256, (4, 9, 7, 3), dtype=np.uint8),
        y_test=np.arange(4),
    )
    return {key: value for key, value in (arrays | changes).items() if value is not None}


@pytest.mark.parametrize("label_shape", [(-1,), (-1, 1)])
def test_npz_with_colours(tmp_path, label_shape):
    arrays = npz_arrays()
    shaped = arrays | {key: arrays[key].reshape(label_shape) for key in ("y_train", "y_test")}
    np.savez(tmp_path / "mine.npz", **shaped)
    dataset = open_dataset(tmp_path / "mine.npz")
    assert (dataset.name, dataset.classes) == ("mine", ["0", "1", "2", "3"])
    assert np.array_equal(dataset.train.images, arrays["x_train"])
    assert np.array_equal(dataset.test.labels, arrays["y_test"])


def test_npz_in_gray(tmp_path):
    arrays = npz_arrays(x_train=RNG.integers(0, 256, (12, 9, 7), dtype=np.uint8))
    np.savez_compressed(tmp_path / "mine.npz", **arrays)
    images = open_dataset(str(tmp_path / "mine.npz")).train.images
    assert np.array_equal(images, np.repeat(arrays["x_train"][..., None], 3, axis=3))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(y_test=None), r"lacks y_test \(it holds x_train, y_train, x_test\)"),
        (dict(x_train=np.zeros((12, 9, 7, 3), np.float32)), "float32 of shape"),
        (dict(x_train=np.zeros((12, 63), np.uint8), x_test=np.zeros((4, 63), np.uint8)), r"shape \[12, 63\]"),
        (dict(x_train=np.zeros((12, 9, 7, 4), np.uint8)), r"shape \[12, 9, 7, 4\]"),
        (dict(x_test=np.zeros((4, 8, 7, 3), np.uint8)), r"\[9, 7\] and test images \[8, 7\]"),
        (dict(y_train=np.arange(11) % 4), "one integer for each of 12 images"),
        (dict(y_train=np.arange(12.0) % 4), "labels are float64"),
        (dict(y_train=np.arange(12) % 4 + 1), "from 0 without gaps"),
        (dict(y_train=np.arange(12) % 4 - 1), "from 0 without gaps"),
        (dict(y_test=np.array([0, 1, 2, 4])), "label 4 of image 3 is out of range"),
        (dict(y_test=np.array([0, -1, 2, 3])), "label -1 of image 1 is out of range"),
        (dict(x_test=np.zeros((0, 9, 7, 3), np.uint8), y_test=np.zeros(0, int)), "at least one image"),
        (dict(y_train=np.array([{}] * 12, dtype=object)), "Cannot read"),
    ],
)
def test_wrong_npz_is_explained(tmp_path, changes, message):
    np.savez(tmp_path / "mine.npz", **npz_arrays(**changes))
    with pytest.raises(DataError, match=message):
        open_dataset(tmp_path / "mine.npz")


def test_damaged_npz_is_explained(tmp_path):
    np.savez(tmp_path / "mine.npz", **npz_arrays())
    whole = (tmp_path / "mine.npz").read_bytes()
    for content in (b"", b"text", whole[:-100]):
        (tmp_path / "mine.npz").write_bytes(content)
        with pytest.raises(DataError, match="Cannot read .*mine.npz"):
            open_dataset(tmp_path / "mine.npz")
