"""attention_transfer against the formula in float64."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from stablekd_fast.kernels import attention_transfer, attention_transfer_with_grad
from stablekd_fast.kernels.attention_transfer import reference
from stablekd_fast.kernels.attention_transfer.reference import Operands
from tests.kernels.precision import assert_as_exact_as_pytorch, poisoned

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def expected_loss(student, target, power=2.0):
    """As the authors' code has it, for any power."""
    maps = [F.normalize(x.abs().pow(power).mean(1).flatten(1), dim=1) for x in (student, target)]
    return (maps[0] - maps[1]).pow(2).mean()


def operands(n=3, c=5, d=7, h=4, w=6, dtype=torch.float32, layouts=(torch.contiguous_format,) * 2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.randn(n, channels, h, w, generator=generator) for channels in (c, d)]
    spread = 0.5 + torch.rand(n, 1, h, w, generator=generator)  # otherwise maps of many channels are nearly constant
    student, target = maps[0] * spread, 1.5 * maps[1] / spread
    return tuple(x.to(dtype).contiguous(memory_format=layout) for x, layout in zip((student, target), layouts))


def check_against_float64(student, target, power=2.0, weight=2.5):
    exact = student.double().requires_grad_()
    expected = weight * expected_loss(exact, target.double(), power)
    (expected_grad,) = torch.autograd.grad(expected, exact)
    loss, grad = attention_transfer_with_grad(student, target, power=power, weight=weight)
    assert loss.dtype == torch.float32 and not loss.requires_grad
    assert grad.dtype == student.dtype and grad.stride() == torch.empty_like(student).stride()
    epsilon, finfo = torch.finfo(torch.float32).eps, torch.finfo(student.dtype)
    places = student.shape[2] * student.shape[3]
    torch.testing.assert_close(
        loss.double(), expected.detach(), rtol=32 * epsilon, atol=16 * epsilon**2 * weight / places
    )
    # Places where the maps nearly agree are as inexact as the others, relative to the largest.
    atol = 64 * epsilon * expected_grad.abs().max().item() + finfo.smallest_normal * finfo.eps
    torch.testing.assert_close(grad.double(), expected_grad, rtol=finfo.eps, atol=atol)


@given(
    n=st.integers(1, 4),
    c=st.integers(1, 40),
    d=st.integers(1, 40),
    side=st.integers(2, 9),
    dtype=st.sampled_from(FLOATS),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
)
def test_agrees_with_float64(n, c, d, side, dtype, layouts):
    check_against_float64(*operands(n, c, d, side, side + 1, dtype, layouts, seed=n * c * d * side))


@pytest.mark.parametrize("layouts", list(product(LAYOUTS, LAYOUTS)), ids=str)
def test_large_maps(layouts):
    check_against_float64(*operands(4, 16, 64, 32, 32, layouts=layouts))
    check_against_float64(*operands(2, 66, 18, 57, 45, torch.bfloat16, layouts))


@pytest.mark.parametrize("dtypes", list(product(FLOATS, FLOATS)), ids=str)
def test_student_and_target_may_have_different_types(dtypes):
    student, target = operands()
    check_against_float64(student.to(dtypes[0]), target.to(dtypes[1]))


@pytest.mark.parametrize("power", [1.0, 1.5, 3.0, 4])
def test_other_powers(power):
    check_against_float64(*operands(), power=power)
    check_against_float64(*operands(layouts=(torch.channels_last,) * 2, dtype=torch.bfloat16), power=power)


def test_double_precision_stays():
    student, target = operands(dtype=torch.float64)
    loss, grad = attention_transfer_with_grad(student, target, weight=3.0)
    exact = student.requires_grad_()
    expected = 3 * expected_loss(exact, target)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(grad, torch.autograd.grad(expected, exact)[0])
    assert loss.dtype == grad.dtype == torch.float64


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("nearness", [1.0, 1e-3])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_as_exact_as_pytorch(dtype, nearness, layout):
    def near(seed):
        away, target = operands(4, 32, 32, 9, 9, layouts=(layout, layout), seed=seed)
        return (target + nearness * away).to(dtype), target.to(dtype)

    def plain(student, target):
        maps = [F.normalize(x.pow(2).mean(1).flatten(1), dim=1) for x in (student, target)]
        return (maps[0] - maps[1]).pow(2).mean()

    assert_as_exact_as_pytorch(attention_transfer_with_grad, plain, [near(seed) for seed in range(6)])


def test_maps_without_length_have_finite_gradients():
    student, target = operands()
    zero, away = torch.zeros_like(student), torch.zeros_like(target)
    for a, b in ((zero, target), (student, away), (zero, away)):
        got = attention_transfer_with_grad(a, b)
        assert got[0].isfinite() and got[1].isfinite().all()
        expected = reference.attention_transfer_with_grad(Operands(a, b, 2.0), 1.0, None)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("layouts", list(product(LAYOUTS, LAYOUTS)), ids=str)
@pytest.mark.parametrize("scale", [1e-7, 1e-4, 1e6, 1e8])
def test_small_and_large_features(scale, layouts):
    student, target = (x * scale for x in operands(layouts=layouts))
    got = attention_transfer_with_grad(student, target)
    x, y = student.double().requires_grad_(), target.double()
    maps = [z.square().mean(1).flatten(1) for z in (x, y)]
    units = [m / (m.square().sum(1, keepdim=True) + 1e-12).sqrt() for m in maps]
    expected = (units[0] - units[1]).square().mean()
    (gradient,) = torch.autograd.grad(expected, x)
    torch.testing.assert_close(got[0].double(), expected.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(got[1].double(), gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())


def test_what_is_not_a_number_shows():
    for place in range(2):
        pair = operands()
        pair[place][1, 2, 3, 3] = torch.nan
        assert attention_transfer_with_grad(*pair)[0].isnan()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("channels", [1, 3, 16, 21])
def test_every_element_is_written(layout, channels, monkeypatch):
    student, target = operands(3, channels, 5, 5, 7, layouts=(layout, layout))
    poisoned(monkeypatch)
    loss, grad = attention_transfer_with_grad(student, target)
    assert loss.isfinite() and grad.isfinite().all()


def test_operands_need_not_be_contiguous():
    student, target = operands(4, 6, 8, 6, 6)
    check_against_float64(student[:, ::2, :, 1:], target[:, ::2, 1:, :].transpose(2, 3))
    check_against_float64(student[1:], target[:1].expand(3, -1, -1, -1))
    check_against_float64(student.transpose(2, 3), target)
    tokens = [torch.randn(2, 11, channels) for channels in (24, 16)]
    check_against_float64(*(x.movedim(2, 1).unsqueeze(3) for x in tokens))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_gradients_too_large_for_the_caches(dtype, layout, monkeypatch):
    few = operands(4, 32, 3, 16, 16, dtype, (layout, layout))
    times = 17_000_000 // dtype.itemsize // few[0].numel()
    student, target = (x.repeat(times, 1, 1, 1).contiguous(memory_format=layout) for x in few)
    expected = attention_transfer_with_grad(*few, weight=1000.0)
    poisoned(monkeypatch)
    loss, grad = attention_transfer_with_grad(student, target, weight=1000.0 * times)
    torch.testing.assert_close(loss / times, expected[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(grad, expected[1].repeat(times, 1, 1, 1), rtol=torch.finfo(dtype).eps, atol=1e-9)


def test_the_number_of_threads_changes_no_bit():
    student, target = operands(9, 16, 8, 16, 20)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(attention_transfer_with_grad(student, target))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_first_and_second_derivatives():
    inputs = tuple(x.requires_grad_() for x in operands(2, 2, 3, 2, 3, torch.float64))
    assert torch.autograd.gradcheck(attention_transfer, inputs)
    assert torch.autograd.gradgradcheck(attention_transfer, inputs)
    assert torch.autograd.gradgradcheck(lambda student: attention_transfer(student, inputs[1]).square(), inputs[:1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_backward_honours_the_upstream_gradient(dtype):
    student, target = operands(dtype=dtype, layouts=(torch.channels_last,) * 2)
    student.requires_grad_()
    (-3 * attention_transfer(student, target)).backward()
    for options in (dict(weight=-3.0), dict(weight=1.5, upstream=torch.tensor(-2.0))):
        loss, grad = attention_transfer_with_grad(student, target, **options)
        torch.testing.assert_close(student.grad, grad)
        torch.testing.assert_close(loss, -3 * attention_transfer(student, target).detach())
        assert grad.stride() == student.stride()


def test_the_loss_alone_is_the_same():
    for layouts in product(LAYOUTS, LAYOUTS):
        pair = operands(layouts=layouts)
        assert torch.equal(attention_transfer(*pair), attention_transfer_with_grad(*pair)[0])


def test_never_waits_for_the_device():
    # Meta tensors have no values, so anything that reads one back to the host raises.
    student, target = (x.to("meta") for x in operands())
    loss, grad = reference.attention_transfer_with_grad(Operands(student, target, 2.0), 1.0, None)
    assert loss.shape == () and grad.shape == student.shape


def test_opcheck():
    student, target = operands(2, 3, 2, 4, 4)
    student = student.to(memory_format=torch.channels_last).requires_grad_()
    torch.library.opcheck(torch.ops.stablekd.attention_transfer.default, (student, target, 2.0))
    torch.library.opcheck(
        torch.ops.stablekd.attention_transfer_with_grad.default, (student, target, 2.0, 2.0, torch.tensor(0.5))
    )


def test_compiles_without_a_break():
    student, target = operands()
    student.requires_grad_()

    def training_loss(student):
        return 2 * attention_transfer(student * 1.5 + 0.1, target)

    (expected,) = torch.autograd.grad(training_loss(student), student)
    torch.compiler.reset()
    compiled = torch.compile(training_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(student), student)[0], expected)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(student=torch.zeros(2, 3)), r"student is float32 \[2, 3\]; it must be a floating point \[N, C, H, W\]"),
        (dict(target=torch.zeros(3, 7, 8, 8)), "height and width must agree"),
        (dict(target=torch.zeros(2, 7, 4, 6)), "batch, height and width must agree"),
        (dict(power=0.5), "power=0.5"),
    ],
)
def test_unusable_operands_are_named(change, message):
    student, target = operands()
    for operator in (attention_transfer, attention_transfer_with_grad):
        with pytest.raises(ValueError, match=message):
            operator(**(dict(student=student, target=target) | change))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_same_on_the_gpu_without_waiting(layout):
    student, target = operands(8, 16, 24, 14, 14, layouts=(layout, layout))
    expected = attention_transfer_with_grad(student, target, weight=1000.0)
    student, target = student.cuda(), target.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = attention_transfer_with_grad(student, target, weight=1000.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(tuple(x.cpu() for x in got), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.gpu
def test_captured_on_the_gpu():
    student, target = (x.cuda() for x in operands(8, 16, 24, 14, 14, layouts=(torch.channels_last,) * 2))
    upstream = torch.tensor(3.0, device="cuda")
    expected = attention_transfer_with_grad(student, target, upstream=upstream)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = attention_transfer_with_grad(student, target, upstream=upstream)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
