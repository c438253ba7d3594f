"""augment_batch against numpy, and the C++ core against the reference."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stablekd_fast.kernels import augment_batch
from stablekd_fast.kernels.augment_batch import reference

MEAN, STD = (0.485, 0.456, 0.406, 0.5), (0.229, 0.224, 0.225, 0.25)


def operands(count=5, height=6, width=7, channels=3, batch=9, padding=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, height, width, channels), dtype=torch.uint8, generator=generator)
    rows = torch.randint(count, (batch,), generator=generator)
    offsets = torch.randint(2 * padding + 1, (batch, 2), generator=generator)
    flips = torch.rand(batch, generator=generator) < 0.5
    settings = dict(padding=padding, mean=MEAN[:channels], std=STD[:channels])
    return (images, rows, offsets, flips), settings


def by_reference(tensors, settings, dtype=torch.float32, channels_last=True):
    return reference.augment_batch(
        *tensors, settings["padding"], list(settings["mean"]), list(settings["std"]), dtype, channels_last
    )


def by_numpy(tensors, padding, mean, std):
    images, rows, offsets, flips = (tensor.numpy() for tensor in tensors)
    height, width = images.shape[1:3]
    batch = []
    for row, (top, left), flip in zip(rows, offsets, flips):
        padded = np.pad(images[row], ((padding, padding), (padding, padding), (0, 0)))
        crop = padded[top : top + height, left : left + width]
        crop = (crop[:, ::-1] if flip else crop).astype(np.float32) / np.float32(255)
        batch.append((crop - np.float32(mean)) / np.float32(std))
    return torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2)


@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    channels=st.integers(1, 4),
    padding=st.integers(0, 12),
    channels_last=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_bitwise_equal_to_numpy_by_every_implementation(height, width, channels, padding, channels_last, dtype):
    tensors, settings = operands(height=height, width=width, channels=channels, padding=padding)
    expected = by_numpy(tensors, **settings).to(dtype)
    got = augment_batch(*tensors, **settings, dtype=dtype, channels_last=channels_last)
    assert got.dtype == dtype and torch.equal(got, expected)
    assert torch.equal(by_reference(tensors, settings, dtype, channels_last), expected)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert got.is_contiguous(memory_format=layout)


def test_more_threads_than_one_change_nothing():
    tensors, settings = operands(height=32, width=32, batch=70, padding=4)
    expected = by_numpy(tensors, **settings)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(augment_batch(*tensors, **settings), expected)
    finally:
        torch.set_num_threads(threads)


def test_float64_is_computed_in_float64():
    (images, *rest), settings = operands(padding=0)
    got = augment_batch(images, *rest, **settings, dtype=torch.float64)
    single = augment_batch(images, *rest, **settings)
    assert got.dtype == torch.float64 and 0 < (got - single).abs().max() < 1e-5


def test_border_is_black_before_normalisation():
    (images, rows, _, flips), settings = operands(padding=6)
    corner = augment_batch(images, rows, torch.zeros(len(rows), 2, dtype=torch.int64), flips, **settings)
    black = -torch.tensor(MEAN[:3]) / torch.tensor(STD[:3])
    assert torch.equal(corner, black.view(1, 3, 1, 1).expand_as(corner))


def test_operands_need_not_be_contiguous():
    (images, rows, offsets, flips), settings = operands()
    strided = (images.transpose(1, 2).contiguous().transpose(1, 2), rows, offsets.t().contiguous().t(), flips)
    assert not strided[0].is_contiguous() and not strided[2].is_contiguous()
    assert torch.equal(augment_batch(*strided, **settings), by_numpy(strided, **settings))


def test_empty_batch():
    tensors, settings = operands(batch=0)
    assert augment_batch(*tensors, **settings).shape == (0, 3, 6, 7)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("rows", 5, r"rows has values in \d\.\.5; they must lie in 0\.\.4 \(there are 5 images\)"),
        ("rows", -1, r"rows has values in -1\.\."),
        ("offsets", 5, r"offsets has values in \d\.\.5; they must lie in 0\.\.4"),
        ("offsets", -1, r"offsets has values in -1\.\."),
    ],
)
def test_reading_outside_is_refused_by_every_implementation(name, value, message):
    (images, rows, offsets, flips), settings = operands()
    (rows if name == "rows" else offsets).view(-1)[3] = value
    for implementation in (lambda *tensors: augment_batch(*tensors, **settings), lambda *t: by_reference(t, settings)):
        with pytest.raises(ValueError, match=message):
            implementation(images, rows, offsets, flips)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(images=torch.zeros(5, 6, 7, 3)), r"images is float32 \[5, 6, 7, 3\]; it must be uint8"),
        (dict(rows=torch.zeros(9)), r"rows is float32 \[9\]; it must be int64 \[9\]"),
        (dict(offsets=torch.zeros(8, 2, dtype=torch.int64)), r"offsets is int64 \[8, 2\]; it must be int64 \[9, 2\]"),
        (dict(flips=torch.zeros(9)), r"flips is float32 \[9\]; it must be bool \[9\]"),
        (dict(mean=(0.5,)), "mean has 1 and std 3 values; images with 3 channels need 3"),
        (dict(std=(0.0, 1.0, 1.0)), "every value must be greater than 0"),
        (dict(padding=-1), "padding=-1"),
        (dict(dtype=torch.uint8), "floating point"),
    ],
)
def test_unusable_operands_are_named(change, message):
    tensors, settings = operands()
    arguments = dict(zip(("images", "rows", "offsets", "flips"), tensors)) | settings | change
    with pytest.raises(ValueError, match=message):
        augment_batch(**arguments)


@pytest.mark.parametrize("channels_last", [True, False])
def test_opcheck(channels_last):
    tensors, settings = operands()
    torch.library.opcheck(
        torch.ops.stablekd.augment_batch.default,
        (*tensors, 2, list(settings["mean"]), list(settings["std"]), torch.float32, channels_last),
    )


@pytest.mark.gpu
def test_bitwise_same_on_the_gpu():
    tensors, settings = operands()
    got = augment_batch(*(tensor.cuda() for tensor in tensors), **settings)
    assert torch.equal(got.cpu(), by_numpy(tensors, **settings))
