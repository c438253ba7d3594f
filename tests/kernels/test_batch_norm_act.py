"""`batch_norm_act` against torch's batch norm, addition and ReLU in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from stablekd_fast import kernels
from stablekd_fast.kernels._checks import OperandError
from tests.kernels.precision import assert_as_exact_as_pytorch, poisoned

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(4, 16, 6, 5), (3, 64, 4, 4), (2, 7, 3, 3), (5, 83, 2, 1), (40, 33, 9, 9)]


def operands(shape, dtype, *, seed=0, channels_last=True, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, residual, gradient = (
        torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=layout) for _ in range(3)
    )
    weight, bias = torch.rand(shape[1], generator=generator) + 0.5, torch.randn(shape[1], generator=generator)
    return (x + offset).to(dtype).contiguous(memory_format=layout), residual, gradient, weight, bias


def plain(x, residual, weight, bias, relu, eps=1e-5):
    """torch's own three operators; the statistics are x's."""
    y = F.batch_norm(x, None, None, weight.to(x.dtype), bias.to(x.dtype), training=True, eps=eps)
    y = y if residual is None else y + residual
    return F.relu(y) if relu else y


def gradients(function, leaves, gradient):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves if leaf is not None]
    return torch.autograd.grad(function(*leaves), leaves, gradient)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_those_of_float64_rounded_once(shape, dtype, added, relu, monkeypatch):
    x, residual, _, weight, bias = operands(shape, dtype)
    residual = residual if added else None
    poisoned(monkeypatch)
    found = kernels.batch_norm_act(x, weight, bias, residual=residual, relu=relu)
    exact = plain(x.double(), None if residual is None else residual.double(), weight.double(), bias.double(), relu)
    assert found.dtype == dtype and found.stride() == x.stride()
    eps = torch.finfo(dtype).eps
    scale = exact.abs() + (0 if residual is None else residual.double().abs()) + 4
    # Half a unit in the last place for the result, and a few roundings of float32 before it.
    assert ((found.double() - exact).abs() <= 0.5 * eps * exact.abs() + 8 * 2**-24 * scale + 1e-7).all()


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_float64(shape, added, relu):
    x, residual, gradient, weight, bias = operands(shape, torch.float32)
    leaves = [x, weight, bias] + [residual] * added

    def ours(x, weight, bias, residual=None):
        return kernels.batch_norm_act(x, weight, bias, residual=residual, relu=relu)

    def exact(x, weight, bias, residual=None):
        return plain(x, residual, weight, bias, relu)

    found = gradients(ours, leaves, gradient)
    expected = gradients(exact, [leaf.double() for leaf in leaves], gradient.double())
    for mine, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=2e-5, atol=2e-6 * float(truth.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("added", [True, False])
def test_errors_are_at_most_twice_those_of_pytorch(dtype, added):
    """Measured are the output's weighted sum and the gradient with respect to x; the float64 answer decides which
    entries pass."""
    draws = []
    for seed in range(6):
        x, residual, gradient, weight, bias = operands((16, 32, 8, 8), dtype, seed=seed)
        draws.append((x, residual, gradient.float(), weight, bias + 6))  # far from the kink, where both round alike

    def loss(x, residual, gradient, weight, bias):
        return (plain(x, residual if added else None, weight, bias, True).to(gradient.dtype) * gradient).sum()

    def fused(x, residual, gradient, weight, bias):
        leaf = x.clone().requires_grad_()
        y = kernels.batch_norm_act(leaf, weight, bias, residual=residual if added else None)
        value = (y.float() * gradient).sum()
        return value.detach(), torch.autograd.grad(value, leaf)[0]

    assert_as_exact_as_pytorch(fused, loss, draws)


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_statistics_of_a_map_far_from_zero(offset):
    """The variance of values around 300 is exact to float32's rounding of the values, not of their squares."""
    x, _, _, weight, bias = operands((32, 24, 8, 8), torch.float32, offset=offset)
    _, mean, variance = torch.ops.stablekd.batch_norm_act(x, None, weight, bias, None, None, None, 0.1, 1e-5, True)
    exact = x.double().var((0, 2, 3), correction=0)
    torch.testing.assert_close(mean.double(), x.double().mean((0, 2, 3)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(variance.double(), exact, rtol=3e-6, atol=0)


def test_running_statistics_are_torch_s():
    x, _, _, weight, bias = operands((6, 16, 5, 5), torch.float32)
    running, batches = [torch.zeros(16), torch.ones(16)], torch.tensor(0)
    expected = [value.double() for value in running]
    for _ in range(3):
        kernels.batch_norm_act(x, weight, bias, *running, batches=batches, momentum=0.3)
        F.batch_norm(x.double(), *expected, weight.double(), bias.double(), training=True, momentum=0.3)
    for mine, truth in zip(running, expected):
        torch.testing.assert_close(mine.double(), truth, rtol=1e-6, atol=1e-7)
    assert batches == 3


def test_the_number_of_threads_changes_no_bit():
    x, residual, gradient, weight, bias = operands((64, 48, 16, 16), torch.bfloat16)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            leaf = x.clone().requires_grad_()
            y = kernels.batch_norm_act(leaf, weight, bias, residual=residual)
            results.append((y.detach(), *torch.autograd.grad(y, leaf, gradient)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@given(
    n=st.integers(1, 9),
    c=st.integers(1, 70),
    h=st.integers(1, 7),
    last=st.booleans(),
    added=st.booleans(),
    relu=st.booleans(),
)
def test_any_shape_and_layout(n, c, h, last, added, relu):
    if n * h * h < 2:
        return
    x, residual, gradient, weight, bias = operands((n, c, h, h), torch.float32, channels_last=last, seed=n * c + h)
    leaf = x.clone().requires_grad_()
    y = kernels.batch_norm_act(leaf, weight, bias, residual=residual if added else None, relu=relu)
    exact = plain(x.double(), residual.double() if added else None, weight.double(), bias.double(), relu)
    torch.testing.assert_close(y.detach().double(), exact, rtol=1e-4, atol=1e-4)
    assert y.stride() == x.stride()
    torch.autograd.grad(y, leaf, gradient)


def test_a_gradient_in_another_layout_and_a_strided_one():
    x, residual, gradient, weight, bias = operands((4, 16, 6, 6), torch.float32)
    leaf = x.clone().requires_grad_()
    y = kernels.batch_norm_act(leaf, weight, bias, residual=residual.contiguous())
    wide = torch.stack([gradient, gradient])[:, :, :, :, ::1].transpose(0, 1)[:, 1]
    expected = torch.autograd.grad(y, leaf, gradient, retain_graph=True)[0]
    for other in (gradient.contiguous(), wide, gradient.sum().expand_as(gradient)):
        found = torch.autograd.grad(y, leaf, other, retain_graph=True)[0]
        if other.dim() and torch.equal(other, gradient):
            assert torch.equal(found, expected)
        assert found.isfinite().all()


def test_not_a_number_and_infinity_come_through():
    x, _, _, weight, bias = operands((4, 16, 6, 6), torch.float32)
    x[0, 3, 0, 0] = torch.nan
    y = kernels.batch_norm_act(x, weight, bias)
    assert y[:, 3].isnan().all() and y[:, :3].isfinite().all() and y[:, 4:].isfinite().all()


def test_gradcheck_in_float64():
    x, residual, _, weight, bias = (
        t.double() if t.is_floating_point() else t for t in operands((3, 4, 3, 3), torch.float32)
    )
    for relu in (True, False):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias, residual)]
        assert torch.autograd.gradcheck(
            lambda x, w, b, r, relu=relu: kernels.batch_norm_act(x, w, b, residual=r, relu=relu), leaves
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    x, residual, gradient, weight, bias = operands((2, 16, 4, 4), dtype)
    running = (torch.zeros(16), torch.ones(16), torch.tensor(0))
    op = torch.ops.stablekd.batch_norm_act.default
    torch.library.opcheck(op, (x, residual, weight, bias, *running, 0.1, 1e-5, True))
    y, mean, variance = op(x, residual, weight, bias, None, None, None, 0.1, 1e-5, True)
    torch.library.opcheck(
        torch.ops.stablekd.batch_norm_act_backward.default,
        (gradient, x, y, weight, bias, mean, variance, 1e-5, True, True),
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(4, 16, dtype=torch.int64)}, "floating point"),
        ({"x": torch.zeros(1, 16, 1, 1)}, "more than one value per channel"),
        ({"weight": torch.ones(3)}, r"weight is float32 \[3\]; it must be \[16\]"),
        ({"running_mean": torch.ones(3)}, "running_mean"),
        ({"running_mean": torch.ones(16)}, "give both or neither"),
        ({"residual": torch.zeros(4, 16, 2, 2)}, "residual is float32"),
        ({"residual": torch.zeros(4, 16, 6, 6, dtype=torch.float64)}, "residual is float64"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    fitting = {"x": torch.zeros(4, 16, 6, 6), "weight": torch.ones(16), "bias": torch.zeros(16)}
    with pytest.raises(OperandError, match=message):
        kernels.batch_norm_act(**(fitting | change))
