"""Image files to RGB pixels, with one error for everything that can be wrong with a file."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from stablekd_fast.errors import DataError

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
)


class BadImage(DataError):
    """An image file that cannot be used. `path` and `reason` say which and why."""

    def __init__(self, path: Path, reason: str):
        self.path, self.reason = path, reason
        super().__init__(
            f"Cannot use image {path}: {reason}. Replace or delete the file, "
            "or have such files left out and counted (on_bad_image: skip)."
        )


def image_size(path: Path) -> tuple[int, int]:
    """Height and width in pixels, from the header alone. Raises `BadImage`."""
    with _reporting(path), Image.open(path) as image:
        return image.height, image.width


def read_rgb(path: Path) -> Image.Image:
    """Decode the file to an upright 8-bit RGB image. Raises `BadImage`.

    The EXIF orientation is applied, 16-bit gray keeps its high byte, transparency is dropped (as
    torchvision does), and of an animation the first frame is taken.
    """
    with _reporting(path), Image.open(path) as image:
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))


def resize(image: Image.Image, height: int, width: int) -> Image.Image:
    """Bilinear with antialiasing, rounded to 8 bits; the same image when the size already fits."""
    if (image.height, image.width) == (height, width):
        return image
    return image.resize((width, height), Image.Resampling.BILINEAR)


def resized_crop(image: Image.Image, box: np.ndarray, size: int) -> np.ndarray:
    """Cut `box` (top, left, height, width) out and scale it to uint8 `[size, size, 3]`."""
    top, left, height, width = (int(value) for value in box)
    return np.asarray(resize(image.crop((left, top, left + width, top + height)), size, size))


def centre_crop(image: Image.Image, size: int) -> np.ndarray:
    """Scale the short side to size * 256 / 224 and cut the centre out: uint8 `[size, size, 3]`."""
    short = round(size * 256 / 224)
    scale = short / min(image.height, image.width)
    image = resize(image, max(short, int(image.height * scale)), max(short, int(image.width * scale)))
    top, left = round((image.height - size) / 2), round((image.width - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)))


@contextmanager
def _reporting(path: Path) -> Iterator[None]:
    """Turns whatever a decoder raises on damaged bytes into `BadImage`."""
    try:
        yield
    except (BadImage, MemoryError):
        raise
    except Exception as error:
        # PIL's plugins raise OSError, SyntaxError, ValueError, struct.error and more on damaged files;
        # no shorter list is complete.
        raise BadImage(path, _reason(path, error)) from error


def _reason(path: Path, error: Exception) -> str:
    if path.is_file() and path.stat().st_size == 0:
        return "the file is empty"
    if isinstance(error, Image.UnidentifiedImageError):
        return "it is not an image of a known format"
    return str(error).rstrip(".") or type(error).__name__


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "I;16", "I;16B", "I;16L"):
        # PIL clips such values at 255 instead of scaling them.
        return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("it holds floating-point pixels of unknown range, 8 or 16 bits are needed")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")
