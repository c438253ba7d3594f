"""feature_mse against torch.nn.functional in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from stablekd_fast.kernels import dequantize_rows, feature_mse, feature_mse_with_grad, quantize_rows
from stablekd_fast.kernels.feature_mse import reference
from stablekd_fast.kernels.feature_mse.reference import Operands
from tests.kernels.precision import assert_as_exact_as_pytorch, poisoned

NORMALIZATIONS = [None, "power", "channel", "l2"]


def expected_loss(student, target, normalize=None, channel_axis=1):
    student, target = student.double(), target.double()
    if normalize == "power":
        return F.mse_loss(student, target) / (target.norm() ** 2 / target.numel())
    if normalize == "channel":
        student, target = student.movedim(channel_axis, 1), target.movedim(channel_axis, 1)
        others = [axis for axis in range(target.dim()) if axis != 1]
        variance, mean = torch.var_mean(target, others, correction=0)
        return F.mse_loss(F.batch_norm(student, mean, variance), F.batch_norm(target, mean, variance))
    if normalize == "l2":
        student, target = F.normalize(student.flatten(1), dim=1), F.normalize(target.flatten(1), dim=1)
        return F.mse_loss(student, target, reduction="none").sum(1).mean()
    return F.mse_loss(student, target)


def operands(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, target = (torch.randn(*shape, generator=generator) for _ in range(2))
    return student.to(dtype), (0.5 * target + 0.3).to(dtype)


def check_against_float64(student, target, normalize, channel_axis=1, weight=1.0):
    exact = student.double().requires_grad_()
    expected = weight * expected_loss(exact, target, normalize, channel_axis)
    (expected_grad,) = torch.autograd.grad(expected, exact)
    loss, grad = feature_mse_with_grad(student, target, normalize=normalize, channel_axis=channel_axis, weight=weight)
    assert loss.dtype == torch.float32 and not loss.requires_grad
    assert grad.dtype == student.dtype and grad.stride() == torch.empty_like(student).stride()
    epsilon = torch.finfo(torch.float32).eps
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=32 * epsilon, atol=0)
    # Elements where student and target nearly agree are as inexact as the large ones, relative to the largest.
    rtol = torch.finfo(student.dtype).eps + 32 * epsilon
    atol = 32 * epsilon * expected_grad.abs().max().item() + torch.finfo(student.dtype).smallest_normal
    if student.dtype == torch.float16:
        atol += torch.finfo(torch.float16).smallest_normal * torch.finfo(torch.float16).eps
    torch.testing.assert_close(grad.double(), expected_grad, rtol=rtol, atol=atol)


@given(
    n=st.integers(1, 4),
    c=st.integers(1, 9),
    side=st.integers(2, 6),
    normalize=st.sampled_from(NORMALIZATIONS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    channels_last=st.booleans(),
)
def test_agrees_with_float64(n, c, side, normalize, dtype, channels_last):
    student, target = operands(n, c, side, side + 1, dtype=dtype, seed=n * c * side)
    if channels_last:
        student = student.to(memory_format=torch.channels_last)
    check_against_float64(student, target, normalize, weight=2.5)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_tokens_have_channels_on_the_last_axis(normalize):
    check_against_float64(*operands(3, 5, 7), normalize, channel_axis=-1)


@given(
    n=st.integers(1, 3),
    c=st.integers(1, 20),
    side=st.integers(1, 6),
    normalize=st.sampled_from(NORMALIZATIONS),
    codes=st.sampled_from([torch.int8, torch.float8_e4m3fn]),
    channels_last=st.booleans(),
    per_sample=st.booleans(),
)
def test_a_target_may_be_8_bit_codes(n, c, side, normalize, codes, channels_last, per_sample):
    student, target = operands(n, c, side, side, seed=c)
    if channels_last:
        student, target = (x.to(memory_format=torch.channels_last) for x in (student, target))
    stored, scales = quantize_rows(target, codes)
    scales = scales if per_sample else scales[0].contiguous()
    options = dict(normalize=normalize, weight=3.0)
    loss, grad = feature_mse_with_grad(student, stored, target_scale=scales, **options)
    wide_loss, wide_grad = feature_mse_with_grad(student, dequantize_rows(stored, scales), **options)
    torch.testing.assert_close(loss, wide_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, wide_grad, rtol=1e-4, atol=1e-5 * wide_grad.abs().max().item() + 1e-30)
    assert grad.stride() == student.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("nearness", [1.0, 1e-3])
def test_as_exact_as_pytorch(dtype, normalize, nearness):
    def near(seed):
        away, target = operands(4, 32, 9, 9, seed=seed)
        return (target + nearness * away).to(dtype), target.to(dtype)

    def plain(student, target):
        if normalize == "power":
            return F.mse_loss(student, target) / target.square().mean()
        if normalize == "channel":
            variance, mean = torch.var_mean(target, (0, 2, 3), correction=0, keepdim=True)
            deviation = (variance + reference.CHANNEL_EPSILON).sqrt()
            return F.mse_loss((student - mean) / deviation, (target - mean) / deviation)
        if normalize == "l2":
            student, target = (F.normalize(x.flatten(1), dim=1) for x in (student, target))
            return F.mse_loss(student, target, reduction="sum") / len(student)
        return F.mse_loss(student, target)

    def fused(student, target):
        return feature_mse_with_grad(student, target, normalize=normalize)

    assert_as_exact_as_pytorch(fused, plain, [near(seed) for seed in range(4)])


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_every_element_is_written(normalize, channels_last, monkeypatch):
    student, target = operands(3, 5, 7, 3)
    if channels_last:
        student, target = (x.to(memory_format=torch.channels_last) for x in (student, target))
    stored, scales = quantize_rows(target)
    poisoned(monkeypatch)
    for options in (dict(target=target), dict(target=stored, target_scale=scales)):
        loss, grad = feature_mse_with_grad(student, normalize=normalize, **options)
        assert loss.isfinite() and grad.isfinite().all()


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_the_number_of_threads_changes_nothing(normalize):
    student, target = operands(5, 32, 30, 31)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(feature_mse_with_grad(student, target, normalize=normalize))
    finally:
        torch.set_num_threads(threads)
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(grad, results[0][1])


def test_a_mean_far_from_zero_does_not_spoil_the_variance():
    student, target = operands(4, 3, 16, 16)
    student, target = student * 1e-2 + 1e3, target * 1e-2 + 1e3
    loss = feature_mse(student, target, normalize="channel")
    torch.testing.assert_close(loss.double(), expected_loss(student, target, "channel"), rtol=1e-4, atol=0)


def test_compiles_without_a_break():
    student, target = operands(2, 3, 4, 4)
    student.requires_grad_()

    def training_loss(student):
        return 2 * feature_mse(student * 1.5, target, normalize="power")

    (expected,) = torch.autograd.grad(training_loss(student), student)
    torch.compiler.reset()
    compiled = torch.compile(training_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(student), student)[0], expected)


def test_channel_axis_matters():
    student, target = operands(3, 5, 7)
    first, last = (feature_mse(student, target, normalize="channel", channel_axis=axis) for axis in (1, 2))
    assert not torch.isclose(first, last)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_channels_last_is_kept(normalize):
    student, target = operands(2, 3, 4, 4)
    student = student.to(memory_format=torch.channels_last)
    _, grad = feature_mse_with_grad(student, target, normalize=normalize)
    assert grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_operands_need_not_be_contiguous(normalize):
    student, target = operands(4, 6, 5, 5)
    check_against_float64(student[:, ::2, :, 1:], target[:, ::2, :, 1:], normalize)


def test_precomputed_power_replaces_the_targets_own():
    student, target = operands(2, 3, 4, 4, dtype=torch.float64)
    plain, plain_grad = feature_mse_with_grad(student, target)
    loss, grad = feature_mse_with_grad(student, target, normalize="power", scale=torch.tensor(4.0))
    torch.testing.assert_close(loss, plain / 4)
    torch.testing.assert_close(grad, plain_grad / 4)
    torch.testing.assert_close(
        feature_mse(student, target, normalize="power", scale=target.square().mean()),
        feature_mse(student, target, normalize="power"),
    )


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_targets_without_variance_stay_finite(normalize):
    student, target = operands(2, 3, 4, 4)
    for dead in (torch.zeros_like(target), torch.full_like(target, 2.0)):
        loss, grad = feature_mse_with_grad(student, dead, normalize=normalize)
        assert loss.isfinite() and grad.isfinite().all()
    loss, grad = feature_mse_with_grad(torch.zeros_like(student), target, normalize=normalize)
    assert loss.isfinite() and grad.isfinite().all()


def test_l2_lies_between_0_and_4():
    student, _ = operands(3, 4, 5, 5, dtype=torch.float64)
    assert feature_mse(student, 7 * student, normalize="l2").item() == pytest.approx(0, abs=1e-12)
    assert feature_mse(student, -2 * student, normalize="l2").item() == pytest.approx(4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_backward_honours_the_upstream_gradient(normalize, dtype):
    student, target = operands(2, 3, 4, 4, dtype=dtype)
    student.requires_grad_()
    (-3 * feature_mse(student, target, normalize=normalize)).backward()
    _, grad = feature_mse_with_grad(student, target, normalize=normalize, weight=-3.0)
    rtol = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(student.grad, grad, rtol=rtol, atol=rtol * grad.abs().max().item())


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_first_and_second_derivatives(normalize):
    inputs = tuple(x.requires_grad_() for x in operands(2, 3, 2, 2, dtype=torch.float64))

    def loss(student, target):
        return feature_mse(student, target, normalize=normalize)

    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(lambda student: loss(student, inputs[1]).square(), inputs[:1])


def test_derivatives_by_the_given_power():
    student, target = operands(2, 3, 2, dtype=torch.float64)
    power = torch.tensor(1.7, dtype=torch.float64)
    inputs = tuple(x.requires_grad_() for x in (student, target, power))

    def loss(student, target, power):
        return feature_mse(student, target, normalize="power", scale=power)

    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_never_waits_for_the_device(normalize):
    # Meta tensors have no values, so anything that reads one back to the host raises.
    student, target = (x.to("meta") for x in operands(2, 3, 4, 4))
    loss, grad = reference.feature_mse_with_grad(Operands(student, target, None, normalize, None, 1), 1.0, None)
    assert loss.shape == () and grad.shape == student.shape


@pytest.mark.parametrize("normalize", ["power", "l2"])
def test_opcheck(normalize):
    student, target = operands(2, 3, 4, 4)
    student = student.to(memory_format=torch.channels_last)
    scale = torch.tensor(2.0) if normalize == "power" else None
    torch.library.opcheck(
        torch.ops.stablekd.feature_mse.default, (student.clone().requires_grad_(), target, None, normalize, scale, 1)
    )
    torch.library.opcheck(
        torch.ops.stablekd.feature_mse_with_grad.default,
        (student, target, None, normalize, scale, 1, 2.0, torch.tensor(0.5)),
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(target=torch.zeros(2, 4, 4, 4)), r"target is float32 \[2, 4, 4, 4\] but student float32 \[2, 3, 4, 4\]"),
        (dict(student=torch.zeros(3), target=torch.zeros(3)), "at least one more"),
        (dict(normalize="max"), "normalize='max'"),
        (dict(scale=torch.tensor(1.0)), "needs normalize='power'"),
        (dict(normalize="power", scale=torch.ones(1)), "0-dim"),
        (dict(target=torch.zeros(2, 3, 4, 4, dtype=torch.int8)), r"its scale None; such codes need a float32 scale"),
        (dict(target_scale=torch.ones(3)), "only int8 and float8_e4m3fn have one"),
        (dict(channel_axis=0), "channel_axis=0"),
        (dict(channel_axis=4), "channel_axis=4"),
    ],
)
def test_unusable_operands_are_named(change, message):
    student, target = operands(2, 3, 4, 4)
    for operator in (feature_mse, feature_mse_with_grad):
        with pytest.raises(ValueError, match=message):
            operator(**(dict(student=student, target=target) | change))


@pytest.mark.gpu
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_same_on_the_gpu_without_waiting(normalize):
    student, target = operands(8, 16, 7, 7)
    expected = feature_mse_with_grad(student, target, normalize=normalize)
    student, target = student.cuda(), target.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = feature_mse_with_grad(student, target, normalize=normalize)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(tuple(x.cpu() for x in got), expected, rtol=1e-5, atol=1e-7)
