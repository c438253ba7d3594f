"""Opening a data set by path or name: images, classes, normalisation and augmentation that suit it."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import torch

from stablekd_fast.data.augmentation import Augmentation
from stablekd_fast.data.formats.arrays import find_idx, read_digits, read_idx, read_npz
from stablekd_fast.data.formats.cifar import read_cifar
from stablekd_fast.data.formats.encoded import SMALL_SIDE, Encoded, encoded_splits
from stablekd_fast.data.formats.interactions import Interactions, divided, made_up, read_interactions
from stablekd_fast.data.formats.presets import PRESETS, class_names, preset_folder
from stablekd_fast.data.formats.several import joined, with_test
from stablekd_fast.data.formats.unlabelled import unlabelled_folder
from stablekd_fast.data.found import images_in_file, laid_out_images
from stablekd_fast.data.pixels import resize
from stablekd_fast.data.split import OnBadImage, Split
from stablekd_fast.errors import ConfigError, DataError
from stablekd_fast.files.reading import foreign

EMBEDDED = ("digits", "fashion-mnist-small", "interactions")
FASHION = Path(__file__).with_name("embedded") / "fashion_mnist_small.npz"
"""5,000 training and 2,000 test images of Fashion-MNIST; the folder's README.md says whose, and how they were taken."""

Channels = tuple[float, float, float]

IMAGENET_MEAN: Channels = (0.485, 0.456, 0.406)
IMAGENET_STD: Channels = (0.229, 0.224, 0.225)


def _gray(value: float) -> Channels:
    return value, value, value


# Mean and standard deviation of the training images, as the literature uses them.
_STATISTICS: dict[str, tuple[Channels, Channels]] = {
    "digits": (_gray(0.3053), _gray(0.3760)),
    "mnist": (_gray(0.1307), _gray(0.3081)),
    "fashion-mnist": (_gray(0.2860), _gray(0.3530)),
    "fashion-mnist-small": (_gray(0.2860), _gray(0.3530)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}

_FASHION_CLASSES = [
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot",
]  # fmt: skip

_KINDS = (
    f"give {', '.join(EMBEDDED)}, {', '.join(PRESETS)}, a folder with train/CLASS/* and test/CLASS/* (or val), one "
    "with train*.tar and val*.tar (WebDataset) or with train-*-of-* and validation-*-of-* (TFRecord), a CIFAR-10 or "
    "CIFAR-100 archive or its folder, a folder with MNIST's four idx files, an .npz file, or an .inter file of what "
    "users had to do with items; for images without labels a folder that has some in it or below it, a .txt file of "
    "paths, a .tar, or several of these with commas between them"
)


@dataclass
class Dataset:
    """A training and a test split with all that belongs to them.

    `mean` and `std` are per channel, for images scaled to 0..1. `validation` is a split of its own to look at while
    training, where the data set has one. All fields may be replaced, for instance by the statistics with which a
    teacher was trained.
    """

    name: str
    classes: list[str]
    """In the order of their numbers; empty where no image has a label, until a teacher gives them."""
    train: Split
    test: Split
    mean: Channels
    std: Channels
    augmentation: Augmentation
    validation: Split | None = None
    notes: list[str] = field(default_factory=list)
    """What was decided about the files, and what of them is not used, in sentences."""
    left_out: dict[str, int] = field(default_factory=dict)
    """How many files and folders are not used, by reason."""
    popularity: torch.Tensor | None = None
    """Where samples are users and classes are items: the training interactions of each item, int64 `[classes]`."""

    def model_size(self, example: torch.Tensor) -> int:
        """Return what a model by name is made for: the side in pixels of images `[N, 3, H, W]`, or the number of
        users."""
        return example.shape[-1] if self.popularity is None else self.train.total


def open_dataset(
    path_or_name: str | Path | Sequence[str | Path],
    *,
    image_size: int | None = None,
    on_bad_image: OnBadImage = "stop",
) -> Dataset:
    """Open the data set at a path, or by its name; or several as one, given as a list or with commas between them.
    Raises `DataError`.

    Names: "digits" and "fashion-mnist-small" (embedded), "interactions" (users and items, made up), and those of
    `PRESETS`, which are fetched where they are not there yet. Kinds: a folder with `train/CLASS/*` and `test/CLASS/*`
    (or `val`, or both), itself or one level below; a folder with WebDataset tars or TFRecords, named `train*` and
    `val*` or `test*`; the archives of CIFAR-10 and CIFAR-100 (Python or binary version, packed or not); a folder with
    the four idx files of MNIST or Fashion-MNIST; `.npz` with x_train, y_train, x_test, y_test; `.inter` with users and
    items (see `read_interactions`). Images without labels: a folder of anything with images in it or below it, a text
    file (`.txt`, `.lst`, `.list`) of paths, a `.tar`. Their split's `labelled` is false, `classes` is empty, and where
    there is no test split, some of them are held out as one.

    `image_size` is the side in pixels to which all images are brought; by default small ones (up to 64 pixels) keep
    their size and large ones are trained on at 224. What was decided about the files, and what of them is not used, is
    told by a warning, and kept in `notes`. `on_bad_image` says what happens at a damaged file of a folder:
    "stop" raises an error that names it, "skip" leaves it out and records it in `split.skipped`.
    """
    if on_bad_image not in get_args(OnBadImage):
        raise ConfigError(f"on_bad_image must be 'stop' or 'skip', got {on_bad_image!r}.")
    if image_size is not None and image_size < 1:
        raise ConfigError(f"The image size must be at least 1 pixel, got {image_size}.")
    sources = _sources(path_or_name)
    if len(sources) == 1:
        dataset = _open_one(sources[0], image_size, on_bad_image)
    else:
        dataset = _open_several(sources, image_size, on_bad_image)
    for note in dataset.notes:
        warnings.warn(note, stacklevel=2)
    return dataset


def _open_embedded(name: str, image_size: int | None) -> Dataset:
    if name == "interactions":
        return _interactions_dataset(name, made_up(), image_size)
    if name == "digits":
        return _array_dataset(name, *read_digits(), Augmentation("pad_crop", flip=False, padding=1), image_size)
    _, train, test = read_npz(FASHION)
    augmentation = Augmentation("pad_crop", flip=True, padding=2)
    return _array_dataset(name, list(_FASHION_CLASSES), train, test, augmentation, image_size)


def _sources(given: str | Path | Sequence[str | Path]) -> Sequence[str | Path]:
    """What was given, one by one: a list, or a text with commas that is no path itself."""
    if isinstance(given, str) and "," in given and not Path(given).expanduser().exists():
        given = [source.strip() for source in given.split(",") if source.strip()]
    given = [given] if isinstance(given, (str, Path)) else list(given)
    if not given:
        raise DataError(f"No data set was given; {_KINDS}.")
    return given


def _open_one(path_or_name: str | Path, image_size: int | None, on_bad_image: OnBadImage) -> Dataset:
    if path_or_name in EMBEDDED:
        return _open_embedded(str(path_or_name), image_size)
    path = _place_of(path_or_name)
    with foreign(path, DataError, "Mend, fetch or write it anew."):
        found = _encoded_at(path)
        if found is not None:
            return _encoded_dataset(found, image_size, on_bad_image)
        return _open_arrays_in(path, image_size) if path.is_dir() else _open_file(path, image_size)


def _open_several(sources: Sequence[str | Path], image_size: int | None, on_bad_image: OnBadImage) -> Dataset:
    found = []
    for source in sources:
        path = None if source in EMBEDDED else _place_of(source)
        with foreign(source, DataError, "Mend, fetch or write it anew."):
            encoded = _encoded_at(path) if path is not None else None
        if encoded is None:
            raise DataError(
                f"{source} was given among several data sets, and it holds no image files; only folders of images, "
                "lists of them and tars go together. Give it by itself."
            )
        found.append(encoded)
    return _encoded_dataset(joined(found), image_size, on_bad_image)


def _place_of(path_or_name: str | Path) -> Path:
    path = Path(path_or_name).expanduser()
    if isinstance(path_or_name, str) and path_or_name in PRESETS and not path.exists():
        path = preset_folder(path_or_name)
    if not path.exists():
        raise DataError(f"There is no data set at {path}; {_KINDS}.")
    return path


def _encoded_at(path: Path) -> Encoded | None:
    """The encoded images at a path; None where it holds arrays or nothing."""
    if not path.is_dir():
        return images_in_file(path)
    found = laid_out_images(path)
    if found is not None or find_idx(path) is not None or read_cifar(path) is not None:
        return found
    return unlabelled_folder(path)


def _open_arrays_in(path: Path, image_size: int | None) -> Dataset:
    idx_files = find_idx(path)
    if idx_files is not None:
        return _open_idx(path, idx_files, image_size)
    cifar = read_cifar(path)
    if cifar is not None:
        return _array_dataset(*cifar, Augmentation("pad_crop", flip=True, padding=4), image_size)
    raise DataError(f"{path} has no train folder, no images and is no other known data set; {_KINDS}.")


def _open_file(path: Path, image_size: int | None) -> Dataset:
    augmentation = Augmentation("pad_crop", flip=True, padding=4)
    if path.suffix == ".npz":
        return _array_dataset(path.stem, *read_npz(path), augmentation, image_size)
    if path.suffix == ".inter":
        return _interactions_dataset(path.stem, read_interactions(path), image_size)
    if path.name.endswith((".tar.gz", ".tgz")):
        cifar = read_cifar(path)
        if cifar is not None:
            return _array_dataset(*cifar, augmentation, image_size)
    if path.name.endswith((".tar.gz", ".tgz", ".zip")):
        raise DataError(f"{path} is a packed archive: unpack it first and give the folder.")
    raise DataError(f"{path} is no known data set; {_KINDS}.")


def _encoded_dataset(found: Encoded, image_size: int | None, on_bad_image: OnBadImage) -> Dataset:
    labels, count = found.parts["train"][1], len(found.parts["train"][0])
    found = with_test(found)
    splits, decided = encoded_splits(found.root, found.parts, crop_size=image_size, on_bad_image=on_bad_image)
    train, name = splits["train"], found.root.resolve().name
    if train.resident:
        augmentation = Augmentation("pad_crop", flip=True, padding=4)
    else:
        augmentation = Augmentation("resized_crop", flip=True, size=train.crop_size)
    notes = [*found.notes, *decided]
    if labels is None:
        notes.insert(0, f"{name}: {count:,} images without labels.")
    return Dataset(
        name, class_names(found.classes), train, splits["test"], IMAGENET_MEAN, IMAGENET_STD, augmentation,
        splits.get("validation"), notes, found.left_out,
    )  # fmt: skip


def _open_idx(path: Path, files: dict[str, Path], image_size: int | None) -> Dataset:
    # Both data sets use the same file names, so only the folder can tell which one it is.
    folders = "/".join(path.resolve().parts[-2:]).lower()
    fashion = "fashion" in folders or "fmnist" in folders
    name = "fashion-mnist" if fashion else "mnist"
    classes = list(_FASHION_CLASSES) if fashion else [str(digit) for digit in range(10)]
    train, test = read_idx(files, len(classes))
    return _array_dataset(name, classes, train, test, Augmentation("pad_crop", flip=fashion, padding=2), image_size)


def _array_dataset(
    name: str, classes: list[str], train: Split, test: Split, augmentation: Augmentation, image_size: int | None
) -> Dataset:
    mean, std = _STATISTICS.get(name, (IMAGENET_MEAN, IMAGENET_STD))
    if image_size is not None:
        train, test = (_resized(split, image_size) for split in (train, test))
    return Dataset(name, classes, train, test, mean, std, augmentation)


def _interactions_dataset(name: str, found: Interactions, image_size: int | None) -> Dataset:
    if image_size is not None:
        raise DataError(f"image_size={image_size} was given, but {name} has users and items; leave it out.")
    parts, unchanged = divided(found), Augmentation("pad_crop", flip=False)
    black = _gray(0.0), _gray(1.0)
    return Dataset(
        name, found.names, parts.train, parts.test, *black, unchanged, parts.validation, popularity=parts.popularity
    )


def _resized(split: Split, size: int) -> Split:
    height, width = split.images.shape[1:3]
    if (height, width) == (size, size):
        return split
    if size > SMALL_SIDE:
        raise DataError(
            f"Images that come as arrays ({width} x {height} pixels) are kept in memory and can be resized to "
            f"at most {SMALL_SIDE} pixels, got {size}; write them into a folder of image files for more."
        )
    return Split(split.labels, images=torch.stack([resize(image, size, size) for image in split.images]))
