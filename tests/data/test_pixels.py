import numpy as np
import pytest
import torch
from PIL import Image

from stablekd_fast.data.pixels import (
    BadImage,
    centre_crop,
    decode_rgb,
    decode_scaled,
    read_header,
    resize,
    resized_crop,
)
from stablekd_fast.data.records import FileRecords


def pixels(path) -> np.ndarray:
    """Decoded, after a look at the header that must agree."""
    content = path.read_bytes()
    header, image = read_header(content, path), decode_rgb(content, path)
    assert image.dtype == torch.uint8 and image.shape == (header.height, header.width, 3)
    return image.numpy()


def test_gray_is_replicated(tmp_path):
    gray = np.arange(60, dtype=np.uint8).reshape(6, 10)
    Image.fromarray(gray).save(tmp_path / "a.png")
    assert np.array_equal(pixels(tmp_path / "a.png"), np.repeat(gray[..., None], 3, axis=2))


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    deep = (np.arange(60, dtype=np.uint16) * 1000).reshape(6, 10)
    Image.fromarray(deep).save(tmp_path / "a.png")
    assert np.array_equal(pixels(tmp_path / "a.png")[..., 0], (deep // 256).astype(np.uint8))


def test_transparency_is_dropped(tmp_path):
    image = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    image.save(tmp_path / "a.png")
    assert (pixels(tmp_path / "a.png") == (10, 20, 30)).all()


def test_palette_becomes_colours(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.save(tmp_path / "plain.png")
    image.save(tmp_path / "clear.png", transparency=bytes((0, 128)))
    for name in ("plain.png", "clear.png"):
        assert (pixels(tmp_path / name) == (200, 100, 50)).all()


def test_cmyk_becomes_rgb(tmp_path):
    Image.new("CMYK", (16, 16), (255, 0, 0, 0)).save(tmp_path / "a.jpg", quality=95)
    red, green, blue = pixels(tmp_path / "a.jpg").reshape(-1, 3).mean(0)
    assert red < 20 and green > 230 and blue > 230


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (40, 20))
    image.paste((255, 255, 255), (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    upright = pixels(tmp_path / "a.jpg")
    assert upright.shape == (40, 20, 3)
    assert upright[:18].mean() > 240 and upright[22:].mean() < 15


def test_floating_point_pixels_are_refused(tmp_path):
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(BadImage, match="a.tif.*floating-point"):
        pixels(tmp_path / "a.tif")


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_truncated_file_is_named(tmp_path, suffix):
    path = tmp_path / f"cut.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 50, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(BadImage, match=f"cut.{suffix}"):
        pixels(path)


def test_empty_and_foreign_files_are_named(tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("no picture")
    for name, reason in (("empty", "is empty"), ("text", "not an image")):
        with pytest.raises(BadImage, match=f"{name}.jpg: .*{reason}"):
            pixels(tmp_path / f"{name}.jpg")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(BadImage, match="missing.jpg: No such file"):
        FileRecords(str(tmp_path), ["missing.jpg"]).read(0)


def test_decompression_bomb_is_reported(tmp_path, monkeypatch):
    Image.new("RGB", (100, 100)).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    with pytest.raises(BadImage, match="huge.png: .*10000 pixels"):
        pixels(tmp_path / "huge.png")


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("progressive", [False, True])
def test_both_decoders_of_plain_jpegs_give_the_same_bits(tmp_path, mode, progressive):
    noise = np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((131, 93)).convert(mode).save(tmp_path / "a.jpg", quality=90, progressive=progressive)
    assert read_header((tmp_path / "a.jpg").read_bytes(), tmp_path / "a.jpg").plain
    assert np.array_equal(pixels(tmp_path / "a.jpg"), np.asarray(Image.open(tmp_path / "a.jpg").convert("RGB")))


def test_damaged_bytes_inside_a_jpeg_give_what_pillow_gives(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    path = tmp_path / "a.jpg"
    Image.fromarray(noise).resize((300, 200)).save(path, quality=90)
    sound, random = path.read_bytes(), np.random.default_rng(1)
    refused = 0
    for _ in range(40):
        content = bytearray(sound)
        content[random.integers(len(sound) // 4, len(sound))] = random.integers(256)
        path.write_bytes(content)
        try:
            expected = np.asarray(Image.open(path).convert("RGB"))
        except Exception:
            refused += 1
            with pytest.raises(BadImage):
                pixels(path)
        else:
            assert np.array_equal(pixels(path), expected)
    assert refused < 40


@pytest.mark.parametrize("size", [(224, 224), (60, 300), (17, 23)])
def test_resize_is_bilinear_with_antialiasing_to_half_a_level_twice(size):
    """It is done in two passes, each rounded to eight bits."""
    image = torch.randint(0, 256, (131, 97, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    exact = torch.nn.functional.interpolate(
        image.double().permute(2, 0, 1)[None], size=size, mode="bilinear", antialias=True
    )[0].permute(1, 2, 0)
    assert (resize(image, *size).double() - exact).abs().max() <= 1.02


@pytest.mark.parametrize(
    "box, factor", [((0, 0, 600, 800), 8), ((100, 200, 300, 260), 4), ((7, 9, 130, 300), 2), ((5, 5, 90, 90), 1)]
)
def test_scaled_decoding_is_as_small_as_the_box_allows(tmp_path, box, factor):
    """An image without high frequencies stays the same picture."""
    small = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    Image.fromarray(small).resize((800, 600), Image.Resampling.BICUBIC).save(tmp_path / "a.jpg", quality=95)
    content = (tmp_path / "a.jpg").read_bytes()
    header, box = read_header(content, tmp_path), np.array(box)
    scaled, moved = decode_scaled(content, tmp_path, header, box, 64)
    assert scaled.shape == (600 // factor, 800 // factor, 3) and min(moved[2:]) >= 64
    one, other = (resized_crop(*part, 64).double() for part in ((scaled, moved), (decode_rgb(content, tmp_path), box)))
    assert (one - other).abs().mean() < 1.5


def test_resized_crop_takes_its_box():
    image = Image.new("RGB", (30, 20))
    image.paste((255, 128, 0), (10, 5, 18, 15))
    crop = resized_crop(torch.from_numpy(np.array(image)), np.array([5, 10, 10, 8]), 6).numpy()
    assert crop.dtype == np.uint8 and crop.shape == (6, 6, 3)
    assert (crop == (255, 128, 0)).all()


def test_resized_crop_averages_when_it_shrinks():
    stripes = np.zeros((40, 40, 3), np.uint8)
    stripes[:, ::2] = 255
    crop = resized_crop(torch.from_numpy(stripes), np.array([0, 0, 40, 40]), 5).numpy()
    assert (abs(crop.astype(int) - 128) < 15).all()


@pytest.mark.parametrize("size", [(300, 200), (57, 90), (64, 64)])
def test_centre_crop_keeps_the_middle(size):
    height, width = size
    ramp = np.broadcast_to(np.linspace(0, 255, width, dtype=np.uint8)[None, :, None], (height, width, 3))
    crop = centre_crop(torch.from_numpy(np.ascontiguousarray(ramp)), 56).numpy()
    assert crop.shape == (56, 56, 3)
    # 56 of 64 pixels of the short side are kept, so this fraction of the ramp around its middle.
    kept = 56 / 64 * min(height, width) / width
    assert abs(crop[:, 0].mean() - 255 * (1 - kept) / 2) < 4
    assert abs(crop[:, -1].mean() - 255 * (1 + kept) / 2) < 4
