"""Data sets that come as arrays: scikit-learn's digits, MNIST's idx files, `.npz`."""

import gzip
import math
import struct
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from stablekd_fast.data.split import Split
from stablekd_fast.errors import DataError
from stablekd_fast.execution.memory import left
from stablekd_fast.files.reading import foreign, open_regular

# How the digits are split. Changing either number makes results incomparable.
_DIGITS_SEED = 0
_DIGITS_TEST_FRACTION = 0.2

_IDX_UINT8 = 0x08
_IDX_PARTS = ("train-images", "train-labels", "t10k-images", "t10k-labels")
_NPZ_KEYS = ("x_train", "y_train", "x_test", "y_test")


def array_split(where: str, images: np.ndarray, labels: np.ndarray, class_count: int) -> Split:
    """Make a resident split of uint8 images `[N, H, W]`, `[N, H, W, 1]` or `[N, H, W, 3]` and labels `[N]`.

    Gray is replicated to three channels. `where` names the arrays in the `DataError` raised for a wrong shape or type
    and for a label outside 0..class_count-1.
    """
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in (1, 3)):
        raise DataError(
            f"{where}: images are {images.dtype} of shape {list(images.shape)}; "
            "needed is uint8 of shape [N, H, W] or [N, H, W, 3]."
        )
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != images.shape[:1] or not len(labels):
        raise DataError(
            f"{where}: labels are {labels.dtype} of shape {list(labels.shape)}; "
            f"needed is one integer for each of {len(images)} images, and at least one image."
        )
    wrong = np.flatnonzero((labels < 0) | (labels >= class_count))
    if wrong.size:
        raise DataError(
            f"{where}: label {labels[wrong[0]]} of image {wrong[0]} is out of range; "
            f"labels of {class_count} classes run from 0 to {class_count - 1}."
        )
    if images.ndim == 3:
        images = images[..., None]
    coloured = np.broadcast_to(images, (*images.shape[:3], 3))
    # A tensor takes over only memory that may be written to.
    owned = np.require(coloured, requirements=["C_CONTIGUOUS", "WRITEABLE"])
    return Split(torch.from_numpy(labels.astype(np.int64)), images=torch.from_numpy(owned))


def read_digits() -> tuple[list[str], Split, Split]:
    """Return the 1,797 handwritten digits (8 x 8) that scikit-learn ships, in a fixed 80/20 split.

    Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998.
    """
    from sklearn.datasets import load_digits  # takes a second to import; only this data set needs it

    digits: Any = load_digits()  # its type depends on its arguments, which scikit-learn does not declare
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    whole = array_split("digits", images, digits.target, 10)
    parts = whole.holdout(round(_DIGITS_TEST_FRACTION * len(whole)), _DIGITS_SEED)
    train, test = (Split(part.labels, images=part.images) for part in parts)
    return [str(digit) for digit in range(10)], train, test


def find_idx(folder: Path) -> dict[str, Path] | None:
    """Find MNIST's four files in `folder`, gzipped or not; None when there are none.

    Raises `DataError` when some are missing.
    """
    found = {}
    for part in _IDX_PARTS:
        kind = "idx3" if part.endswith("images") else "idx1"
        names = (f"{part}{separator}{kind}-ubyte{ending}" for ending in ("", ".gz") for separator in "-.")
        matches = [folder / name for name in names if (folder / name).is_file()]
        if matches:
            found[part] = matches[0]
    missing = [part for part in _IDX_PARTS if part not in found]
    if found and missing:
        raise DataError(f"{folder} lacks the idx files {', '.join(missing)}; put all four into one folder.")
    return found or None


def read_idx(files: dict[str, Path], class_count: int) -> tuple[Split, Split]:
    """Return the training and the test split of MNIST-like idx files."""
    train, test = (
        array_split(
            str(files[f"{part}-images"]),
            _read_idx_array(files[f"{part}-images"], 3),
            _read_idx_array(files[f"{part}-labels"], 1),
            class_count,
        )
        for part in ("train", "t10k")
    )
    return train, test


def _read_idx_array(path: Path, dimensions: int) -> np.ndarray:
    """Read an idx file: two zero bytes, element type, number of dimensions, sizes as big-endian int32, data."""
    start = 4 + 4 * dimensions
    with foreign(path, DataError, "Fetch the file again."), open_regular(path) as packed:
        file = gzip.GzipFile(fileobj=packed) if path.suffix == ".gz" else packed
        head = file.read(start)
        if len(head) < start or head[:4] != bytes((0, 0, _IDX_UINT8, dimensions)):
            raise DataError(f"{path} is not an idx file of bytes in {dimensions} dimensions; fetch the file again.")
        shape = struct.unpack(f">{dimensions}I", head[4:])
        expected = math.prod(shape)
        content, held = _filled(file, expected)
        if held != expected or file.read(1):
            held = held if held < expected else f"more than {held}"
            raise DataError(f"{path} holds {held} bytes where its header announces {expected}; fetch the file again.")
        return content.reshape(shape)


def _filled(file: IO[bytes] | gzip.GzipFile, size: int) -> tuple[np.ndarray, int]:
    """Read at most `size` bytes into an array of so many; return it, and how many there were.

    Raises ValueError if so many do not fit into what is left of main memory.
    """
    there = left(torch.device("cpu"))
    if there is not None and size > there:
        raise ValueError(f"it announces {size:.3g} bytes, and {max(there, 0) / 1e9:.1f} GB of memory are left")
    content, at = np.empty(size, np.uint8), 0
    while chunk := file.read(min(size - at, 1 << 24)):
        content[at : at + len(chunk)] = np.frombuffer(chunk, np.uint8)
        at += len(chunk)
    return content, at


def read_npz(path: Path) -> tuple[list[str], Split, Split]:
    """Read the arrays x_train, y_train, x_test, y_test of an `.npz` file; classes are named by their number."""
    with foreign(path, DataError, "Arrays of plain numbers in .npz format are needed."):
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            held = [name.removesuffix(".npy") for name in archive.namelist()]
            missing = [key for key in _NPZ_KEYS if key not in held]
            if missing:
                raise DataError(
                    f"{path} lacks {', '.join(missing)} (it holds {', '.join(held[:20]) or 'nothing'}); "
                    f"needed are {', '.join(_NPZ_KEYS)}."
                )
            x_train, y_train, x_test, y_test = (_npy(archive, f"{key}.npy") for key in _NPZ_KEYS)
        return _npz_splits(path, x_train, y_train, x_test, y_test)


def _npy(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """Read an array of numbers whose bytes are as many as its header announces. Raises ValueError for any other."""
    member = archive.getinfo(name)
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in read_header:
            raise ValueError(f"{name} is of version {version} of numpy's format")
        shape, by_column, dtype = read_header[version](file)
        size = math.prod(shape) * dtype.itemsize
        if dtype.kind not in "biuf" or file.tell() + size != member.file_size:
            raise ValueError(f"{name} is an array {list(shape)} of {dtype} in {member.file_size} bytes")
        content, held = _filled(file, size)
    if held != size:
        raise ValueError(f"{name} ends after {held} of {size} bytes")
    return content.view(dtype).reshape(shape, order="F" if by_column else "C")


def _npz_splits(
    path: Path, x_train: np.ndarray, y_train: np.ndarray, x_test: np.ndarray, y_test: np.ndarray
) -> tuple[list[str], Split, Split]:
    if x_train.shape[1:3] != x_test.shape[1:3]:
        raise DataError(
            f"{path}: training images are {list(x_train.shape[1:3])} and test images {list(x_test.shape[1:3])} "
            "pixels; both need one size."
        )
    y_train, y_test = _flat_labels(y_train), _flat_labels(y_test)
    present = np.unique(y_train)
    if not np.array_equal(present, np.arange(len(present))):
        raise DataError(
            f"{path}: training labels are {', '.join(map(str, present[:10]))}{', …' if len(present) > 10 else ''}; "
            "number the classes from 0 without gaps."
        )
    train = array_split(f"{path}, x_train", x_train, y_train, len(present))
    test = array_split(f"{path}, x_test", x_test, y_test, len(present))
    return [str(label) for label in range(len(present))], train, test


def _flat_labels(labels: np.ndarray) -> np.ndarray:
    """Take labels as `[N]` or as `[N, 1]`, as Keras and others publish them."""
    return labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
