"""The Triton kernels of augment_batch against the reference, to the last bit."""

import pytest
import torch

from stablekd_fast.kernels.augment_batch import reference
from stablekd_fast.kernels.augment_batch import triton_impl as kernels
from tests.kernels.precision import poisoned

MEAN, STD = [0.485, 0.456, 0.406, 0.5, 0.3, 0.7], [0.229, 0.224, 0.225, 0.25, 0.31, 0.2]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def operands(device, height=6, width=7, channels=3, padding=2, count=5, batch=4):
    generator = torch.Generator().manual_seed(height * width)
    images = torch.randint(0, 256, (count, height, width, channels), dtype=torch.uint8, generator=generator)
    rows = torch.randint(count, (batch,), generator=generator)
    offsets = torch.randint(2 * padding + 1, (batch, 2), generator=generator)
    flips = torch.arange(batch) % 2 == 0
    return tuple(tensor.to(device) for tensor in (images, rows, offsets, flips))


def check(tensors, padding, dtype, channels_last):
    channels = tensors[0].shape[3]
    settings = (padding, MEAN[:channels], STD[:channels], dtype, channels_last)
    expected = reference.augment_batch(*tensors, *settings)
    got = kernels.augment_batch(*tensors, *settings)
    assert got.dtype == dtype and got.stride() == expected.stride() and torch.equal(got, expected)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("dtype", FLOATS)
def test_equal_to_the_reference(device, channels_last, channels, dtype, monkeypatch):
    tensors = operands(device, channels=channels)
    poisoned(monkeypatch)
    check(tensors, 2, dtype, channels_last)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("height, width, padding", [(1, 1, 0), (1, 9, 12), (32, 32, 4), (33, 35, 3), (2, 700, 1)])
def test_sizes_and_paddings(device, channels_last, height, width, padding):
    check(operands(device, height, width, padding=padding), padding, torch.float32, channels_last)


def test_every_value_of_a_pixel_in_every_channel(device):
    images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(-1, -1, -1, 3).to(device)
    picks = operands(device, 16, 16, padding=0, count=1, batch=2)[1:]
    for dtype in FLOATS:
        check((images, *picks), 0, dtype, True)


def test_operands_need_not_be_contiguous(device):
    images, rows, offsets, flips = operands(device)
    images = images.transpose(1, 2).contiguous().transpose(1, 2)
    check((images, rows, offsets.t().contiguous().t(), flips), 2, torch.float32, True)
    # Memory that begins at an odd place.
    images, rows, offsets, flips = operands(device)
    check((images[1:], rows[1:] % 4, offsets[1:], flips[1:]), 2, torch.float32, True)


@pytest.mark.parametrize("name, value", [("rows", 5), ("rows", -1), ("offsets", 5), ("offsets", -1)])
def test_reading_outside_is_refused(device, name, value):
    if device == "cuda":
        pytest.skip("a failed assertion on the device ends every later CUDA call of the process")
    images, rows, offsets, flips = operands(device)
    (rows if name == "rows" else offsets).view(-1)[3] = value
    with pytest.raises(RuntimeError, match="rows or offsets lie outside"):
        kernels.augment_batch(images, rows, offsets, flips, 2, MEAN[:3], STD[:3], torch.float32, True)


def test_the_host_never_waits(monkeypatch):
    # Meta tensors have no values, so anything that reads one back to the host raises.
    monkeypatch.setattr(kernels, "launch", lambda *_: None)
    monkeypatch.setattr(torch, "_assert_async", lambda *_: None)
    out = kernels.augment_batch(*operands("meta"), 2, MEAN[:3], STD[:3], torch.float32, True)
    assert out.shape == (4, 3, 6, 7)


def test_double_precision_and_empty_batches_are_left_to_the_reference(device, launches):
    tensors = operands(device)
    check(tensors, 2, torch.float64, True)
    images, rows, offsets, flips = tensors
    check((images, rows[:0], offsets[:0], flips[:0]), 2, torch.float32, False)
    assert not launches


def test_variants_are_listed_once():
    listed = [entry.variant for entry in kernels.specialisations()]
    assert len(listed) == len(set(listed))
