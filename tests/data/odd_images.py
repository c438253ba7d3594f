"""Some sixty image files as cameras, scanners, browsers and broken disks leave them, made anew each time."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 96, 72
"""The stored pixels; a picture on its side is `HEIGHT` wide."""

TURNED = (5, 6, 7, 8)


def _scene(width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """Four corners of different brightness and colour, so that every turn and every loss of a channel shows."""
    down, right = np.mgrid[0:height, 0:width]
    red, green = 255 * right / width, 255 * down / height
    blue = np.where((right < width / 3) & (down < height / 3), 250, 40)
    return np.stack([red, green, blue], 2).astype(np.uint8)


def _bytes(image: Image.Image, form: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def _exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def _xmp(orientation: int) -> bytes:
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="{orientation}"/></rdf:RDF>'
        "</x:xmpmeta>"
    ).encode()


def _with_segment(jpeg: bytes, marker: int, body: bytes) -> bytes:
    return jpeg[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body + jpeg[2:]


def _png_of_16_bits(values: np.ndarray) -> bytes:
    """A PNG of 16 bits, gray `[H, W]` or colour `[H, W, 3]`; Pillow writes gray ones only."""
    height, width = values.shape[:2]

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", width, height, 16, 0 if values.ndim == 2 else 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def odd_images() -> Iterator[tuple[str, bytes, bool]]:
    """Names, contents, and whether it is an image that can be used, of the files."""
    yield from _turned()
    yield from _colours()
    yield from _depths()
    yield from _kinds()
    yield from _damaged()


def _turned() -> Iterator[tuple[str, bytes, bool]]:
    scene = Image.fromarray(_scene())
    plain = _bytes(scene, "JPEG", quality=95)
    for orientation in (1, 2, 3, 4, 5, 6, 7, 8):
        yield f"exif{orientation}.jpg", _bytes(scene, "JPEG", quality=95, exif=_exif(orientation)), True
        body = b"http://ns.adobe.com/xap/1.0/\0" + _xmp(orientation)
        yield f"xmp{orientation}.jpg", _with_segment(plain, 0xE1, body), True
    for orientation in (0, 9):
        yield f"exif{orientation}.jpg", _bytes(scene, "JPEG", quality=95, exif=_exif(orientation)), True
    yield "exif6.png", _bytes(scene, "PNG", exif=_exif(6)), True
    yield "exif8.webp", _bytes(scene, "WEBP", lossless=True, exif=_exif(8)), True
    yield "turned.tiff", _bytes(scene, "TIFF", tiffinfo={0x0112: 6}), True


def _colours() -> Iterator[tuple[str, bytes, bool]]:
    scene = Image.fromarray(_scene())
    for mode, forms in {
        "L": ("JPEG", "PNG", "TIFF"), "1": ("PNG", "TIFF"), "CMYK": ("JPEG", "TIFF"), "YCbCr": ("TIFF",),
        "P": ("PNG", "GIF", "BMP"),
    }.items():  # fmt: skip
        for form in forms:
            yield f"{mode.lower()}.{form.lower()}", _bytes(scene.convert(mode), form), True
    clear = scene.copy()
    clear.putalpha(Image.fromarray((_scene()[:, :, 0] > 128).astype(np.uint8) * 255))
    for form in ("PNG", "WEBP", "TIFF"):
        options = {"lossless": True, "exact": True} if form == "WEBP" else {}
        yield f"rgba.{form.lower()}", _bytes(clear, form, **options), True
    yield "la.png", _bytes(clear.convert("LA"), "PNG"), True
    yield "palette_clear.png", _bytes(scene.convert("P"), "PNG", transparency=3), True


def _depths() -> Iterator[tuple[str, bytes, bool]]:
    gray = _scene()[:, :, 0].astype(np.uint16)
    yield "gray16.png", _png_of_16_bits(gray * 257), True
    yield "gray12in16.png", _png_of_16_bits(gray * 16), True
    yield "gray8in16.png", _png_of_16_bits(gray), True
    yield "rgb16.png", _png_of_16_bits(_scene().astype(np.uint16) * 257), True
    yield "gray16.tiff", _bytes(Image.fromarray(gray * 257), "TIFF"), True
    yield "float.tiff", _bytes(Image.fromarray(gray.astype(np.float32)), "TIFF"), False
    yield "gray16.pgm", b"P5 96 72 65535\n" + (gray * 257).astype(">u2").tobytes(), True


def _kinds() -> Iterator[tuple[str, bytes, bool]]:
    scene = Image.fromarray(_scene())
    plain = _bytes(scene, "JPEG", quality=95)
    yield "progressive.JPG", _bytes(scene, "JPEG", quality=95, progressive=True), True
    yield "full_colour.jpeg", _bytes(scene, "JPEG", quality=95, subsampling=0), True
    yield "restart.jfif", _bytes(scene, "JPEG", quality=95, restart_marker_blocks=2), True
    yield "named_png.png", plain, True
    yield "named_jpg.jpg", _bytes(scene, "PNG"), True
    yield "with_tail.jpg", plain + b"\0" * 40, True
    yield "animated.gif", _bytes(scene, "GIF", save_all=True, append_images=[scene.rotate(180)]), True
    yield "pages.tif", _bytes(scene, "TIFF", save_all=True, append_images=[scene.rotate(180)]), True
    yield "several.jpg", _bytes(scene, "MPO", save_all=True, append_images=[scene.rotate(180)]), True
    yield "plain.tga", _bytes(scene, "TGA"), True
    yield "lossless.jp2", _bytes(scene, "JPEG2000"), True


def _damaged() -> Iterator[tuple[str, bytes, bool]]:
    plain = _bytes(Image.fromarray(_scene()), "JPEG", quality=95)
    middle = bytearray(plain)
    middle[len(plain) // 2 : len(plain) // 2 + 6] = b"\x12\x34\x56\x78\x9a\xbc"
    yield "damaged_middle.jpg", bytes(middle), True
    yield "cut_short.jpg", plain[: len(plain) * 2 // 3], False
    yield "empty.jpg", b"", False
    yield "text.png", b"version https://git-lfs.github.com/spec/v1\n", False
    yield "postscript.jpg", _bytes(Image.fromarray(_scene()), "EPS"), False
    png = _bytes(Image.fromarray(_scene()), "PNG")
    yield "cut_short.png", png[: len(png) * 2 // 3], False


def write_odd_images(folder: Path) -> dict[str, bool]:
    """Write them; returns by name whether each can be used."""
    folder.mkdir(parents=True)
    usable = {}
    for name, content, good in odd_images():
        (folder / name).write_bytes(content)
        usable[name] = good
    return usable


def scene() -> np.ndarray:
    """What all of them show, uint8 `[HEIGHT, WIDTH, 3]`, before it is turned."""
    return _scene()
