"""The Triton kernels of batch_norm_act against the reference in float64."""

from itertools import cycle, product

import pytest
import torch

from stablekd_fast.kernels.batch_norm_act import reference
from stablekd_fast.kernels.batch_norm_act import triton_impl as kernels
from tests.kernels.precision import poisoned

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [
    (3, 16, 5, 3), (2, 7, 3, 3), (40, 33, 9, 9), (5, 83, 2, 1), (6, 130), (33, 24, 4, 4), (9, 64, 12, 12), (2, 1, 1, 1),
]  # fmt: skip
EPS = 1e-5

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow) encountered:RuntimeWarning")


def laid(x, device):
    return x.to(device).contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.contiguous_format)


def operands(device, shape, dtype, offset=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, residual, gradient = (laid(torch.randn(shape, generator=generator) + offset * (n == 0), device).to(dtype)
                             for n in range(3))  # fmt: skip
    weight, bias = torch.rand(shape[1], generator=generator) + 0.5, torch.randn(shape[1], generator=generator)
    return x, residual, gradient, weight.to(device), bias.to(device)


def running_of(channels, device, kind):
    if kind == "none":
        return [None, None, None]
    batches = torch.tensor(5, device=device) if kind == "counted" else None
    return [torch.linspace(-1, 1, channels).to(device), torch.linspace(0.5, 2, channels).to(device), batches]


def double(*tensors):
    return [t.double() if t is not None and t.is_floating_point() else t for t in tensors]


def copies(tensors):
    return [None if t is None else t.clone() for t in tensors]


@pytest.fixture
def merging(request, monkeypatch):
    """Parts are put together by the second kernel, or by one of their own."""
    if request.param == "apart":
        monkeypatch.setattr(kernels, "_LARGE", 1)


FLAGS = cycle(product((True, False), (True, False), ("none", "kept", "counted")))
MERGINGS = ("together", "apart")
CASES = [
    (shape, dtype, *next(FLAGS), MERGINGS[(n + n // 12) % 2])
    for n, (shape, dtype) in enumerate(product(SHAPES, FLOATS))
]
"""Every shape and type; each shape, and each combination of what else is asked for, with both mergings."""
BOTH = pytest.mark.parametrize("merging", MERGINGS, indirect=True)


@pytest.mark.parametrize("shape, dtype, added, relu, kind, merging", CASES, indirect=["merging"])
def test_forward_agrees_with_float64(device, merging, shape, dtype, added, relu, kind, monkeypatch):
    x, residual, _, weight, bias = operands(device, shape, dtype)
    residual, running = residual if added else None, running_of(shape[1], device, kind)
    expected_running = double(*copies(running))
    expected = reference.batch_norm_act(*double(x, residual, weight, bias), *expected_running, 0.3, EPS, relu)
    poisoned(monkeypatch)
    y, mean, variance = kernels.batch_norm_act(x, residual, weight, bias, *running, 0.3, EPS, relu)
    assert y.dtype == dtype and y.stride() == x.stride()
    scale = 1 + (0 if residual is None else residual.double().abs()) + expected[0].abs()
    allowed = 0.51 * torch.finfo(dtype).eps * expected[0].abs() + 2e-6 * scale
    assert ((y.double() - expected[0]).abs() <= allowed).all()
    torch.testing.assert_close(mean.double(), expected[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(variance.double(), expected[2], rtol=1e-5, atol=1e-7)
    for mine, truth in zip(running, expected_running):
        if mine is not None:
            torch.testing.assert_close(mine.double(), truth.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "shape, dtype, added, relu, merging", [(*case[:4], case[5]) for case in CASES], indirect=["merging"]
)
def test_gradients_agree_with_float64(device, merging, shape, dtype, added, relu, monkeypatch):
    x, residual, gradient, weight, bias = operands(device, shape, dtype)
    none = (None, None, None)
    y, mean, variance = reference.batch_norm_act(x, residual if added else None, weight, bias, *none, 0.1, EPS, relu)
    given = (gradient, x, y if relu and added else None, weight, bias, mean, variance)
    exact = reference.batch_norm_act_backward(*double(*given), EPS, relu, added)
    poisoned(monkeypatch)
    found = kernels.batch_norm_act_backward(*given, EPS, relu, added)
    assert found[0].stride() == x.stride() and found[0].dtype == dtype
    finfo = torch.finfo(dtype)
    for mine, truth, eps in zip(found, exact, (finfo.eps, 1e-6, 1e-6, finfo.eps)):
        assert mine.shape == truth.shape
        if truth.numel():
            atol = 4e-6 * truth.abs().max().item() + 1e-6
            torch.testing.assert_close(mine.double(), truth, rtol=0.51 * eps, atol=atol)


@BOTH
@pytest.mark.parametrize("offset", [300.0, -4000.0])
def test_a_map_far_from_zero(device, merging, offset):
    x, _, _, weight, bias = operands(device, (16, 24, 8, 8), torch.float32, offset=offset)
    _, mean, variance = kernels.batch_norm_act(x, None, weight, bias, None, None, None, 0.1, EPS, True)
    torch.testing.assert_close(mean.double(), x.double().mean((0, 2, 3)), rtol=1e-6, atol=0)
    # The mean is rounded where it stands, and the squares with it.
    rtol = 1e-5 + abs(offset) * 2**-25
    torch.testing.assert_close(variance.double(), x.double().var((0, 2, 3), correction=0), rtol=rtol, atol=0)


def test_a_gradient_in_another_layout_and_operands_that_begin_anywhere(device):
    x, residual, gradient, weight, bias = operands(device, (4, 16, 6, 6), torch.float32)
    y, mean, variance = reference.batch_norm_act(x, residual, weight, bias, None, None, None, 0.1, EPS, True)
    vectors = (weight, bias, mean, variance)
    expected = kernels.batch_norm_act_backward(gradient, x, y, *vectors, EPS, True, True)
    shifted = [torch.cat([t.new_zeros(1), t])[1:] for t in vectors]
    other = kernels.batch_norm_act_backward(gradient.contiguous(), x, y, *shifted, EPS, True, True)
    assert all(torch.equal(a, b) for a, b in zip(expected, other))


def test_not_a_number_comes_through(device):
    x, _, _, weight, bias = operands(device, (4, 16, 6, 6), torch.float32)
    x[0, 3, 0, 0] = torch.nan
    y, *_ = kernels.batch_norm_act(x, None, weight, bias, None, None, None, 0.1, EPS, True)
    assert y[:, 3].isnan().all() and y[:, :3].isfinite().all() and y[:, 4:].isfinite().all()


@pytest.mark.parametrize("change", ["double", "layout", "weight", "running"])
def test_what_the_kernels_do_not_take_goes_to_the_reference(device, launches, change):
    x, _, _, weight, bias = operands(device, (4, 16, 6, 6), torch.float32)
    running = running_of(16, device, "counted")
    if change == "double":
        x = x.double()
    if change == "layout":
        x = x.contiguous()
    if change == "weight":
        weight, bias = weight.double(), bias.double()
    if change == "running":
        running[0] = torch.zeros(17, device=device)[1:]
    expected = reference.batch_norm_act(x, None, weight, bias, *copies(running), 0.1, EPS, True)
    found = kernels.batch_norm_act(x, None, weight, bias, *running, 0.1, EPS, True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected)) and running[2] == 6
    assert not launches
