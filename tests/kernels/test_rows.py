"""quantize_rows and dequantize_rows: their error, their bits in every implementation, and what they refuse."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stablekd_fast.kernels import dequantize_rows, quantize_rows
from stablekd_fast.kernels.dequantize_rows import reference as dequantize_reference
from stablekd_fast.kernels.quantize_rows import reference as quantize_reference

CODES = [torch.int8, torch.float8_e4m3fn]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def rows(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator)
    # Channels of very different size, as activations have.
    return (values * torch.logspace(-3, 1, shape[1]).view(1, -1, *[1] * (len(shape) - 2))).to(dtype)


def bits(tensor):
    return tensor.view(torch.uint8)


@given(
    n=st.integers(1, 3),
    c=st.integers(1, 20),
    side=st.integers(1, 6),
    codes=st.sampled_from(CODES),
    dtype=st.sampled_from(FLOATS),
    channels_last=st.booleans(),
)
def test_every_implementation_gives_the_same_bits(n, c, side, codes, dtype, channels_last):
    values = rows(n, c, side, side + 1, dtype=dtype, seed=c)
    if channels_last:
        values = values.to(memory_format=torch.channels_last)
    got, scales = quantize_rows(values, codes)
    expected, expected_scales = quantize_reference.quantize_rows(values, codes, 1)
    assert torch.equal(bits(got), bits(expected)) and torch.equal(scales, expected_scales)
    assert got.stride() == values.stride() and scales.shape == (n, c)
    for wide in FLOATS:
        back = dequantize_rows(got, scales, wide)
        assert torch.equal(back, dequantize_reference.dequantize_rows(got, scales, wide, 1))
        assert back.stride() == values.stride()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_codes_are_the_nearest(layout):
    values = rows(3, 6, 9, 7).contiguous(memory_format=layout)
    largest = values.abs().amax((2, 3), keepdim=True)
    for codes, steps in ((torch.int8, torch.arange(-127.0, 128)), (torch.float8_e4m3fn, _e4m3_values())):
        back = dequantize_rows(*quantize_rows(values, codes))
        possible = largest / steps.abs().max() * steps.view(-1, 1, 1, 1, 1)
        nearest = (possible - values).abs().amin(0)
        assert ((back - values).abs() <= nearest + 1e-6 * largest).all()


def _e4m3_values():
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    return every[every.isfinite()]


def test_every_code_of_float8_is_read_as_torch_reads_it():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(1, 1, 256)
    for shaped in (codes, codes.view(1, 256, 1)):
        scales = torch.ones(shaped.shape[:2])
        np.testing.assert_array_equal(dequantize_rows(shaped, scales).numpy(), shaped.float().numpy())


def test_every_float8_value_keeps_its_code():
    values = _e4m3_values().view(1, 1, -1)
    codes, scales = quantize_rows(values, torch.float8_e4m3fn)
    assert scales == 1.0 and torch.equal(codes.float(), values)


def test_ties_go_to_the_even_code():
    values = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5]).view(1, 1, -1)
    codes, _ = quantize_rows(values)
    assert codes.flatten().tolist() == [127, 0, 2, 2, 0, -2]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("size", [1.0, 2.0**-95, 2.0**-140, 2.0**120])
def test_quotients_round_as_a_division(size, codes, layout):
    """Beside every tie of two codes, where a unit in the last place of a quotient decides, in numbers of all sizes."""
    generator = torch.Generator().manual_seed(0)
    largest = torch.rand(5, 37, 1, 1, generator=generator) + 1
    ties = (torch.arange(-127, 127) + 0.5) / 127 if codes == torch.int8 else _e4m3_ties() / 448
    values = (largest * ties.view(1, 1, -1, 1)).expand(5, 37, len(ties), 9).contiguous()
    values = values.view(torch.int32).add_(torch.arange(-4, 5, dtype=torch.int32)).view(torch.float32)
    values[:, :, 0, 0], values[:, :, 1, 0], values[:, :, 2, 0] = largest.squeeze(), 0.0, -0.0
    values = (values * size).contiguous(memory_format=layout)
    got, scales = quantize_rows(values, codes)
    expected, expected_scales = quantize_reference.quantize_rows(values, codes, 1)
    assert torch.equal(bits(got), bits(expected)) and torch.equal(scales, expected_scales)


def _e4m3_ties():
    steps = _e4m3_values().unique()
    return (steps[1:] + steps[:-1]) / 2


@pytest.mark.parametrize("codes", CODES)
def test_zero_channels_stay_zero(codes):
    values = rows(2, 3, 4, 4)
    values[:, 1] = 0
    stored, scales = quantize_rows(values, codes)
    assert not scales[:, 1].any() and not dequantize_rows(stored, scales)[:, 1].any()


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_what_is_not_finite_is_never_hidden(bad, codes, layout):
    values = rows(2, 3, 4, 4).contiguous(memory_format=layout)
    values[1, 2, 3, 3] = bad
    stored, scales = quantize_rows(values, codes)
    back = dequantize_rows(stored, scales)
    assert scales.isnan().nonzero().tolist() == [[1, 2]]
    assert back[1, 2].isnan().all() and back.isnan().sum() == 16


@pytest.mark.parametrize("nan", [0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001], ids=hex)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1, 1, 20), (1, 20, 1)])
def test_every_nan_among_the_scales_is_read_as_nan(nan, dtype, shape):
    """The NaN that GPUs make has all bits of the mantissa set: rounded to bfloat16 like a number it would be zero."""
    scales = torch.full(shape[:2], nan, dtype=torch.int32).view(torch.float32)
    assert dequantize_rows(torch.ones(shape, dtype=torch.int8), scales, dtype).isnan().all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(2, 3, 7), (2, 7, 1)])
def test_zeros_keep_the_sign_of_their_scale(dtype, shape):
    codes, scales = torch.zeros(shape, dtype=torch.int8), torch.full(shape[:2], -0.0)
    assert dequantize_rows(codes, scales, dtype).signbit().all()


def test_scales_may_be_shared_by_all_samples():
    stored, _ = quantize_rows(rows(3, 5, 4, 4))
    shared = torch.rand(5)
    assert torch.equal(dequantize_rows(stored, shared), dequantize_rows(stored, shared.expand(3, 5)))


def test_tokens_have_channels_on_the_last_axis():
    values = rows(3, 8, 5).transpose(1, 2)
    for tokens in (values, values.contiguous()):
        stored, scales = quantize_rows(tokens, channel_axis=-1)
        assert scales.shape == (3, 8)
        np.testing.assert_allclose(scales * 127, tokens.abs().amax(1), rtol=1e-6)
        error = (dequantize_rows(stored, scales, channel_axis=-1) - tokens).abs()
        assert (error <= 0.5001 * scales[:, None, :]).all()


def test_empty_rows():
    stored, scales = quantize_rows(torch.zeros(0, 3, 4))
    assert stored.shape == (0, 3, 4) and scales.shape == (0, 3)
    assert dequantize_rows(stored, scales).shape == (0, 3, 4)


def test_rows_need_not_be_contiguous():
    values = rows(4, 6, 8, 8)[:, ::2, 1:, ::2]
    stored, scales = quantize_rows(values)
    dense, dense_scales = quantize_rows(values.contiguous())
    assert torch.equal(stored, dense) and torch.equal(scales, dense_scales)


@pytest.mark.parametrize("codes", CODES)
def test_opcheck(codes):
    values = rows(2, 3, 4, 4).to(memory_format=torch.channels_last)
    torch.library.opcheck(torch.ops.stablekd.quantize_rows.default, (values, torch.int8, 1))
    stored, scales = quantize_rows(values, codes)
    if codes == torch.int8:
        torch.library.opcheck(torch.ops.stablekd.dequantize_rows.default, (stored, scales, torch.bfloat16, 1))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: quantize_rows(torch.zeros(3)), r"rows is float32 \[3\]"),
        (lambda: quantize_rows(torch.zeros(3, 4, dtype=torch.float64)), r"rows is float64 \[3, 4\]"),
        (lambda: quantize_rows(torch.zeros(3, 4), torch.int16), "dtype=torch.int16"),
        (lambda: quantize_rows(torch.zeros(3, 4), channel_axis=0), "channel_axis=0"),
        (lambda: dequantize_rows(torch.zeros(3, 4), torch.ones(4)), r"codes is float32 \[3, 4\]"),
        (
            lambda: dequantize_rows(torch.zeros(3, 4, dtype=torch.int8), torch.ones(3)),
            r"need a float32 scale per channel, \[4\], or per sample and channel, \[3, 4\]",
        ),
        (
            lambda: dequantize_rows(torch.zeros(3, 4, dtype=torch.int8), torch.ones(4), torch.float64),
            "dtype=torch.float64",
        ),
    ],
)
def test_unusable_operands_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.gpu
@pytest.mark.parametrize("codes", CODES)
def test_same_bits_on_the_gpu(codes):
    values = rows(3, 6, 9, 7)
    stored, scales = quantize_rows(values.cuda(), codes)
    expected, expected_scales = quantize_rows(values, codes)
    assert torch.equal(bits(stored.cpu()), bits(expected)) and torch.equal(scales.cpu(), expected_scales)
    assert torch.equal(dequantize_rows(stored, scales).cpu(), dequantize_rows(expected, expected_scales))
