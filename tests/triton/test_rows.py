"""The Triton codecs: the reference's bits."""

from itertools import product

import pytest
import torch

from stablekd_fast.kernels.dequantize_rows import reference as dequantize_reference
from stablekd_fast.kernels.dequantize_rows import triton_impl as dequantize_kernels
from stablekd_fast.kernels.quantize_rows import reference as quantize_reference
from stablekd_fast.kernels.quantize_rows import triton_impl as quantize_kernels

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
CODES = (torch.int8, torch.float8_e4m3fn)
LAYOUTS = (torch.contiguous_format, torch.channels_last)
kernels = (quantize_kernels, dequantize_kernels)

# NumPy, which interprets the kernels, remarks on lanes whose values are never used.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow) encountered:RuntimeWarning")


def rows(device, *shape, dtype=torch.float32, layout=torch.contiguous_format, seed=0):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    # Channels of very different size, as activations have.
    values *= torch.logspace(-3, 1, shape[1]).view(1, -1, *[1] * (len(shape) - 2))
    return (values.contiguous(memory_format=layout) if values.dim() == 4 else values).to(device, dtype)


def bits(tensor):
    return tensor.view(torch.uint8)


def check(values, codes, axis=1):
    got, scales = quantize_kernels.quantize_rows(values, codes, axis)
    expected, expected_scales = quantize_reference.quantize_rows(values, codes, axis)
    torch.testing.assert_close(scales, expected_scales, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(bits(got), bits(expected)) and got.stride() == torch.empty_like(values).stride()
    for operand, dtype in product((scales, scales[0].contiguous()), FLOATS):
        back = dequantize_kernels.dequantize_rows(got, operand, dtype, axis)
        wanted = dequantize_reference.dequantize_rows(got, operand, dtype, axis)
        torch.testing.assert_close(back, wanted, rtol=0, atol=0, equal_nan=True)
        assert back.stride() == got.stride()


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (3, 40, 8, 8), (2, 33, 7, 7), (1, 2, 100, 90), (2, 1, 3, 3)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("codes", CODES, ids=str)
def test_the_references_bits(device, codes, layout, shape):
    for dtype in FLOATS:
        check(rows(device, *shape, dtype=dtype, layout=layout), codes)


@pytest.mark.parametrize("codes", CODES, ids=str)
def test_vectors_tokens_and_strides(device, codes):
    check(rows(device, 4, 24), codes)
    check(rows(device, 3, 8, 5).transpose(1, 2), codes, axis=2)
    check(rows(device, 3, 8, 5).transpose(1, 2).contiguous(), codes, axis=-1)
    check(rows(device, 3, 4, 5, 6), codes, axis=2)
    check(rows(device, 4, 6, 8, 8)[:, ::2, 1:, ::2], codes)


@pytest.mark.parametrize("codes", CODES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("bad", [0.0, torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_and_channels_of_zeros(device, bad, layout, codes):
    values = rows(device, 2, 3, 4, 4, layout=layout)
    values[1, 2, 3, 3], values[0, 1] = bad, 0.0
    check(values, codes)


def test_every_code_of_float8_is_read_and_made(device):
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(1, 1, 256).to(device)
    one = torch.ones(1, 1, device=device)
    values = dequantize_kernels.dequantize_rows(every, one, torch.float32, 1)
    torch.testing.assert_close(values, every.float(), rtol=0, atol=0, equal_nan=True)
    finite = values[values.isfinite()].view(1, 1, -1)
    codes, scale = quantize_kernels.quantize_rows(finite, torch.float8_e4m3fn, 1)
    assert scale.item() == 1 and torch.equal(bits(codes), bits(every[every.float().isfinite()].view(1, 1, -1)))


def test_every_rounding_of_float8(device):
    # Values between, upon and beside all neighbouring codes; the last one makes the scale 1.
    every = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (every[1:] + every[:-1]) / 2
    values = torch.cat([every, middles, middles.nextafter(every[1:]), middles.nextafter(every[:-1])])
    check(torch.cat([values, -values]).view(1, 1, -1).to(device), torch.float8_e4m3fn)


def test_ties_go_to_the_even_code(device):
    values = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5], device=device).view(1, 1, -1)
    codes, _ = quantize_kernels.quantize_rows(values, torch.int8, 1)
    assert codes.flatten().tolist() == [127, 0, 2, 2, 0, -2]


def test_empty_rows_are_left_to_the_reference(device, launches):
    codes, scales = quantize_kernels.quantize_rows(torch.zeros(0, 3, 4, device=device), torch.int8, 1)
    assert dequantize_kernels.dequantize_rows(codes, scales, torch.float32, 1).shape == (0, 3, 4)
    assert not launches


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_host_never_waits(layout, monkeypatch):
    # Meta tensors have no values, so anything that reads one back to the host raises.
    for module in (quantize_kernels, dequantize_kernels):
        monkeypatch.setattr(module, "launch", lambda *_: None)
    codes, scales = quantize_kernels.quantize_rows(rows("meta", 2, 3, 4, 4, layout=layout), torch.int8, 1)
    assert dequantize_kernels.dequantize_rows(codes, scales, torch.bfloat16, 1).shape == (2, 3, 4, 4)


@pytest.mark.parametrize("module", kernels)
def test_variants_are_listed_once(module):
    variants = [entry.variant for entry in module.specialisations()]
    assert len(variants) == len(set(variants))
