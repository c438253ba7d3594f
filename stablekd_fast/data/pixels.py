"""Encoded images to RGB pixels, with one error for everything that can be wrong with one.

Pixels are uint8 `[H, W, 3]` tensors. Plain JPEGs are decoded by torchvision and everything else by Pillow; where both
can, both give the same bits. Sizes are changed by torch's bilinear resampling with antialiasing.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from stablekd_fast.data.augmentation import Interpolation
from stablekd_fast.errors import DataError, printable

_FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jfif", ".jpe"),
    "PNG": (".png",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm"),
    "AVIF": (".avif",),
    "JPEG2000": (".jp2",),
    "TGA": (".tga",),
}
"""Pillow's readers that images are given to, with the endings of file names. Some others, of EPS for one, run
programs."""


def _readers() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


_READERS = _readers()
_UNSIGNED = "TGA"
"""Such images do not say what they are; the ending of their name does."""
_SIGNED = tuple(name for name in _READERS if name != _UNSIGNED)
IMAGE_SUFFIXES = frozenset(suffix for name in _READERS for suffix in _FORMATS[name])

_ORIENTATION = 0x0112
_UPRIGHT, _ON_THEIR_SIDE = 1, (5, 6, 7, 8)
_TURNS = (b"Exif", b"http")
"""Application data that begin so may say how the image is turned: EXIF, and XMP."""
_OF_8_BITS, _OF_12_BITS = 2**8, 2**12

_START_OF_JPEG, _END_OF_JPEG = b"\xff\xd8", b"\xff\xd9"
_TAIL = 64
"""So near to its end a file must say that the image ends: some cameras and tools leave a few bytes behind."""
_FRAMES = (0xC0, 0xC1, 0xC2)
"""Markers of baseline, extended and progressive JPEGs."""
_MOST_PIXELS = 2**26
"""Beyond it Pillow decides whether a file is an image or an attack."""
_WITHOUT_FRAME = (0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0))
"""Tables, comments and application data, which may come before the frame."""
_APPLICATION = 0xE1


class BadImage(DataError):
    """An image that cannot be used. `path` and `reason` say which and why."""

    def __init__(self, path: Path, reason: str):
        self.path, self.reason = path, reason
        super().__init__(
            f"Cannot use image {printable(path)}: {reason}. Replace or delete the file, "
            "or have such files left out and counted (on_bad_image: skip)."
        )


@dataclass(frozen=True)
class Header:
    """What an image says of itself before it is decoded."""

    height: int
    width: int
    """Height and width are those of the upright image, in pixels."""
    plain: bool
    """Whether it is a whole upright JPEG in gray or colour, which all decoders take alike."""


def holds_image(path: str) -> bool:
    """Whether a file begins as an image does, whatever its name."""
    try:
        with Image.open(path, formats=_SIGNED):
            return True
    except Exception:  # as in `_reporting`: no list is complete
        return False


def read_header(content: bytes, path: Path) -> Header:
    """Read the header of an encoded image. `path` names it in the `BadImage` that is raised if it is none."""
    size = _size_of_simple_jpeg(content)
    if size is not None:
        return Header(*size, plain=True)
    with _reporting(content, path), _opened(content, path) as image:
        orientation = image.getexif().get(_ORIENTATION, _UPRIGHT)
        if image.format == "TIFF" and orientation in _ON_THEIR_SIDE:
            image.load()  # Pillow turns these by itself, some versions of it when they are opened
            orientation = _UPRIGHT
        size = image.size if orientation in _ON_THEIR_SIDE else (image.height, image.width)
        whole_jpeg = image.format == "JPEG" and _END_OF_JPEG in content[-_TAIL:] and image.mode in ("L", "RGB")
        return Header(*size, plain=whole_jpeg and orientation == _UPRIGHT)


def decode_rgb(content: bytes, path: Path, header: Header | None = None) -> Tensor:
    """Decode to upright 8-bit RGB, uint8 `[H, W, 3]`. Raises `BadImage`, which names `path`.

    The orientation that EXIF or XMP data tell is applied. Gray of 16 bits keeps the upper 8 of those that its pixels
    need, of 16, 12 or 8. Transparency is dropped (as torchvision does), what lies under it counts. Of an animation
    or of several pages the first is taken. Where the middle of a JPEG is damaged, the decoder's guess is taken; one
    that ends early is bad. `header` saves reading it again.
    """
    if _decode_jpeg is not None and (header or read_header(content, path)).plain:
        try:
            return _decode_jpeg(content)
        except RuntimeError:  # Pillow has the last word on damaged bytes, and says more of them
            pass
    with _reporting(content, path), _opened(content, path) as image:
        image.load()
        ImageOps.exif_transpose(image, in_place=True)  # else it is copied, too
        return torch.from_numpy(np.array(_to_rgb(image)))


def decode_scaled(content: bytes, path: Path, header: Header, box: np.ndarray, size: int) -> tuple[Tensor, np.ndarray]:
    """Decode a plain JPEG at 1/2, 1/4 or 1/8 of its size, as small as `box` can be without having to be blown up to
    `size`.

    The decoder then leaves out the high frequencies, and most of its work. Returns the pixels, and the box in them.
    """
    height, width = header.height, header.width
    _, _, box_height, box_width = (int(side) for side in box)
    with _reporting(content, path), _opened(content, path) as image:
        image.draft("RGB", (math.ceil(width * size / box_width), math.ceil(height * size / box_height)))
        pixels = torch.from_numpy(np.array(image.convert("RGB")))
    vertical, horizontal = pixels.shape[0] / height, pixels.shape[1] / width
    corners = np.array(
        [box[0] * vertical, box[1] * horizontal, (box[0] + box[2]) * vertical, (box[1] + box[3]) * horizontal]
    )
    top, left, bottom, right = np.rint(corners).astype(np.int64)
    return pixels, np.array([top, left, max(bottom - top, 1), max(right - left, 1)])


def resize(pixels: Tensor, height: int, width: int, interpolation: Interpolation = "bilinear") -> Tensor:
    """Resize with antialiasing, rounded to 8 bits; return the same image when the size already fits."""
    if pixels.shape[:2] == (height, width):
        return pixels
    batch = pixels.contiguous()[None].permute(0, 3, 1, 2)  # seen as channels-last, for which torch has its fast path
    return F.interpolate(batch, size=(height, width), mode=interpolation, antialias=True)[0].permute(1, 2, 0)


def resized_crop(pixels: Tensor, box: np.ndarray, size: int, interpolation: Interpolation = "bilinear") -> Tensor:
    """Cut `box` (top, left, height, width) out and scale it to `[size, size, 3]`."""
    top, left, height, width = (int(value) for value in box)
    return resize(pixels[top : top + height, left : left + width], size, size, interpolation)


def centre_crop(
    pixels: Tensor, size: int, short: int | None = None, interpolation: Interpolation = "bilinear"
) -> Tensor:
    """Scale the short side to `short` pixels (by default size * 256 / 224), cut the middle out: `[size, size, 3]`."""
    short = round(size * 256 / 224) if short is None else short
    scale = short / min(pixels.shape[:2])
    height, width = (max(short, int(side * scale)) for side in pixels.shape[:2])
    pixels = resize(pixels, height, width, interpolation)
    top, left = (round((side - size) / 2) for side in pixels.shape[:2])
    return pixels[top : top + size, left : left + size]


def _torchvision_decoder() -> Callable[[bytes], Tensor] | None:
    """Return what decodes a plain JPEG to uint8 `[H, W, 3]`; None where torchvision cannot.

    torchvision announces that its decoders will go; Pillow gives the same bits, a quarter slower.
    """
    try:
        from torchvision.io import ImageReadMode, decode_jpeg
    except ImportError:
        return None

    def decode(content: bytes) -> Tensor:
        planes = decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), mode=ImageReadMode.RGB)
        assert isinstance(planes, Tensor)  # it would be a list for a list
        return planes.permute(1, 2, 0)

    return decode


_decode_jpeg = _torchvision_decoder()


def _size_of_simple_jpeg(content: bytes) -> tuple[int, int] | None:
    """Return height and width of a plain JPEG without EXIF data; None for all else. Pillow knows too, but takes five
    times as long."""
    if content[:2] != _START_OF_JPEG or _END_OF_JPEG not in content[-_TAIL:]:
        return None
    at = 2
    while at + 10 <= len(content) and content[at] == 0xFF:
        marker, length = content[at + 1], int.from_bytes(content[at + 2 : at + 4], "big")
        if marker in _FRAMES:
            bits, height, width, channels = struct.unpack_from(">BHHB", content, at + 4)
            return (height, width) if bits == 8 and channels in (1, 3) and 0 < height * width <= _MOST_PIXELS else None
        if marker not in _WITHOUT_FRAME or (marker == _APPLICATION and content[at + 4 : at + 8] in _TURNS):
            return None
        at += 2 + length
    return None


def _opened(content: bytes, path: Path) -> Image.Image:
    named_so = path.suffix.lower() in _FORMATS[_UNSIGNED]
    return Image.open(io.BytesIO(content), formats=_READERS if named_so else _SIGNED)


@contextmanager
def _reporting(content: bytes, path: Path) -> Iterator[None]:
    """Turn whatever a decoder raises on damaged bytes into `BadImage`."""
    try:
        yield
    except (BadImage, MemoryError):
        raise
    except Exception as error:
        # PIL's plugins raise OSError, SyntaxError, ValueError, struct.error and more on damaged files: no list is
        # complete.
        raise BadImage(path, _reason(content, error)) from error


def _reason(content: bytes, error: Exception) -> str:
    if not content:
        return "the file is empty"
    if isinstance(error, Image.UnidentifiedImageError):
        return "it is not an image of a known format"
    return str(error).rstrip(".") or type(error).__name__


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "I;16", "I;16B", "I;16L"):
        # PIL clips such values at 255 instead of scaling them.
        values = np.asarray(image).astype(np.int64)
        bits = 0 if values.max() < _OF_8_BITS else 4 if values.max() < _OF_12_BITS else 8
        return Image.fromarray((values >> bits).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("it holds floating-point pixels of unknown range, 8 or 16 bits are needed")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")
