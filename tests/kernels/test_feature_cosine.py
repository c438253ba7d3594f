"""feature_cosine against torch.nn.functional in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from stablekd_fast.kernels import dequantize_rows, feature_cosine, feature_cosine_with_grad, quantize_rows
from stablekd_fast.kernels.feature_cosine import reference
from stablekd_fast.kernels.feature_cosine.reference import Operands
from tests.kernels.precision import assert_as_exact_as_pytorch, poisoned

KINDS = ["position", "sample"]


def expected_loss(student, target, per="position", channel_axis=1):
    student, target = student.double(), target.double()
    if per == "sample":
        return 1 - F.cosine_similarity(student.flatten(1), target.flatten(1), dim=1).mean()
    return 1 - F.cosine_similarity(student, target, dim=channel_axis).mean()


def operands(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, target = (torch.randn(*shape, generator=generator) for _ in range(2))
    return student.to(dtype), (0.5 * target + 0.3).to(dtype)


def check_against_float64(student, target, per, channel_axis=1, weight=1.0):
    exact = student.double().requires_grad_()
    expected = weight * expected_loss(exact, target, per, channel_axis)
    (expected_grad,) = torch.autograd.grad(expected, exact)
    loss, grad = feature_cosine_with_grad(student, target, per=per, channel_axis=channel_axis, weight=weight)
    assert loss.dtype == torch.float32 and not loss.requires_grad
    assert grad.dtype == student.dtype and grad.stride() == torch.empty_like(student).stride()
    epsilon = torch.finfo(torch.float32).eps
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=0, atol=8 * epsilon * weight)
    # Vectors that are nearly parallel, single numbers above all, have gradients that cancel.
    rtol = torch.finfo(student.dtype).eps + 32 * epsilon
    lengths = (
        exact.detach().flatten(1).norm(dim=1).min() if per == "sample" else exact.detach().norm(dim=channel_axis).min()
    )
    atol = 8 * epsilon * weight / lengths.item() + torch.finfo(student.dtype).smallest_normal
    torch.testing.assert_close(grad.double(), expected_grad, rtol=rtol, atol=atol)


@given(
    n=st.integers(1, 4),
    c=st.integers(2, 20),
    side=st.integers(1, 7),
    per=st.sampled_from(KINDS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    channels_last=st.booleans(),
)
def test_agrees_with_float64(n, c, side, per, dtype, channels_last):
    student, target = operands(n, c, side, side + 1, dtype=dtype, seed=n * c * side)
    if channels_last:
        student = student.to(memory_format=torch.channels_last)
    check_against_float64(student, target, per, weight=2.5)


@pytest.mark.parametrize("per", KINDS)
def test_wide_maps_and_tokens(per):
    check_against_float64(*operands(2, 5, 13, 11), per)
    check_against_float64(*operands(3, 5, 70), per, channel_axis=-1)
    check_against_float64(*operands(3, 5, 70), per, channel_axis=1)


@given(
    c=st.integers(2, 20),
    side=st.integers(1, 6),
    per=st.sampled_from(KINDS),
    codes=st.sampled_from([torch.int8, torch.float8_e4m3fn]),
    channels_last=st.booleans(),
    per_sample=st.booleans(),
)
def test_a_target_may_be_8_bit_codes(c, side, per, codes, channels_last, per_sample):
    student, target = operands(3, c, side, side, seed=c)
    if channels_last:
        student, target = (x.to(memory_format=torch.channels_last) for x in (student, target))
    stored, scales = quantize_rows(target, codes)
    scales = scales if per_sample else scales[0].contiguous()
    loss, grad = feature_cosine_with_grad(student, stored, target_scale=scales, per=per)
    wide_loss, wide_grad = feature_cosine_with_grad(student, dequantize_rows(stored, scales), per=per)
    torch.testing.assert_close(loss, wide_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, wide_grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("per", KINDS)
@pytest.mark.parametrize("nearness", [1.0, 1e-3])
@pytest.mark.parametrize("channels_last", [True, False])
def test_as_exact_as_pytorch(dtype, per, nearness, channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def near(seed):
        away, target = operands(4, 32, 9, 9, seed=seed)
        return tuple(x.to(dtype).contiguous(memory_format=layout) for x in (target + nearness * away, target))

    def plain(student, target):
        if per == "sample":
            student, target = student.flatten(1), target.flatten(1)
        return 1 - F.cosine_similarity(student, target, dim=1).mean()

    def fused(student, target):
        return feature_cosine_with_grad(student, target, per=per)

    assert_as_exact_as_pytorch(fused, plain, [near(seed) for seed in range(4)])


@pytest.mark.parametrize("per", KINDS)
def test_zero_vectors_have_the_loss_1_and_finite_gradients(per):
    student, target = operands(2, 3, 4, 4)
    for a, b in ((torch.zeros_like(student), target), (student, torch.zeros_like(target))):
        loss, grad = feature_cosine_with_grad(a, b, per=per)
        assert loss == pytest.approx(1.0) and grad.isfinite().all()


@pytest.mark.parametrize("per", KINDS)
def test_only_direction_counts(per):
    student, _ = operands(2, 3, 4, 4)
    assert feature_cosine(student, 8 * student, per=per) == pytest.approx(0, abs=1e-6)
    assert feature_cosine(student, -2 * student, per=per) == pytest.approx(2)


@pytest.mark.parametrize("per", KINDS)
@pytest.mark.parametrize("channels_last", [True, False])
def test_every_element_is_written(per, channels_last, monkeypatch):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    student, target = (x.contiguous(memory_format=layout) for x in operands(3, 5, 7, 9))
    stored, scales = quantize_rows(target)
    poisoned(monkeypatch)
    for options in (dict(target=target), dict(target=stored, target_scale=scales)):
        loss, grad = feature_cosine_with_grad(student, per=per, **options)
        assert loss.isfinite() and grad.isfinite().all()


@pytest.mark.parametrize("per", KINDS)
def test_first_and_second_derivatives(per):
    inputs = tuple(x.requires_grad_() for x in operands(2, 3, 2, 2, dtype=torch.float64))

    def loss(student, target):
        return feature_cosine(student, target, per=per)

    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(lambda student: loss(student, inputs[1]).square(), inputs[:1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("per", KINDS)
def test_backward_honours_the_upstream_gradient(per, dtype):
    student, target = operands(2, 3, 4, 4, dtype=dtype)
    student.requires_grad_()
    (-3 * feature_cosine(student, target, per=per)).backward()
    for options in (dict(weight=-3.0), dict(weight=1.5, upstream=torch.tensor(-2.0))):
        loss, grad = feature_cosine_with_grad(student, target, per=per, **options)
        torch.testing.assert_close(student.grad, grad)
        torch.testing.assert_close(loss, -3 * feature_cosine(student, target, per=per).detach())


@pytest.mark.parametrize("per", KINDS)
def test_never_waits_for_the_device(per):
    # Meta tensors have no values, so anything that reads one back to the host raises.
    student, target = (x.to("meta") for x in operands(2, 3, 4, 4))
    loss, grad = reference.feature_cosine_with_grad(Operands(student, target, None, per, 1), 1.0, None)
    assert loss.shape == () and grad.shape == student.shape


@pytest.mark.parametrize("per", KINDS)
def test_opcheck(per):
    student, target = operands(2, 3, 4, 4)
    student = student.to(memory_format=torch.channels_last).requires_grad_()
    torch.library.opcheck(torch.ops.stablekd.feature_cosine.default, (student, target, None, per, 1))
    torch.library.opcheck(
        torch.ops.stablekd.feature_cosine_with_grad.default, (student, target, None, per, 1, 2.0, torch.tensor(0.5))
    )


def test_compiles_without_a_break():
    student, target = operands(2, 3, 4, 4)
    student.requires_grad_()

    def training_loss(student):
        return 2 * feature_cosine(student * 1.5 + 0.1, target)

    (expected,) = torch.autograd.grad(training_loss(student), student)
    torch.compiler.reset()
    compiled = torch.compile(training_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(student), student)[0], expected)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(target=torch.zeros(2, 4, 4, 4)), r"target is float32 \[2, 4, 4, 4\] but student float32 \[2, 3, 4, 4\]"),
        (dict(per="channel"), "per='channel' was given; it must be 'position' or 'sample'"),
        (dict(channel_axis=0), "channel_axis=0"),
        (dict(target_scale=torch.ones(3)), "only int8 and float8_e4m3fn have one"),
    ],
)
def test_unusable_operands_are_named(change, message):
    student, target = operands(2, 3, 4, 4)
    for operator in (feature_cosine, feature_cosine_with_grad):
        with pytest.raises(ValueError, match=message):
            operator(**(dict(student=student, target=target) | change))


@pytest.mark.gpu
@pytest.mark.parametrize("per", KINDS)
def test_same_on_the_gpu_without_waiting(per):
    student, target = operands(8, 16, 7, 7)
    expected = feature_cosine_with_grad(student, target, per=per)
    student, target = student.cuda(), target.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = feature_cosine_with_grad(student, target, per=per)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(tuple(x.cpu() for x in got), expected, rtol=1e-5, atol=1e-6)
