"""feature_mse against torch.nn.functional in float64."""

from hypothesis import given, strategies as st
import pytest
import torch
from torch.nn import functional as F

from stablekd_fast.kernels import feature_mse, feature_mse_with_grad
from stablekd_fast.kernels.feature_mse import reference

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
    loss, grad = feature_mse_with_grad(
        student, target, normalize=normalize, channel_axis=channel_axis, weight=weight
    )
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
    loss, grad = reference.feature_mse_with_grad(student, target, normalize, None, 1, 1.0)
    assert loss.shape == () and grad.shape == student.shape


@pytest.mark.parametrize("normalize", ["power", "l2"])
def test_opcheck(normalize):
    student, target = operands(2, 3, 4, 4)
    student = student.to(memory_format=torch.channels_last)
    scale = torch.tensor(2.0) if normalize == "power" else None
    torch.library.opcheck(
        torch.ops.stablekd.feature_mse.default, (student.clone().requires_grad_(), target, normalize, scale, 1)
    )
    torch.library.opcheck(
        torch.ops.stablekd.feature_mse_with_grad.default, (student, target, normalize, scale, 1, 2.0)
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(target=torch.zeros(2, 4, 4, 4)), r"target is float32 \[2, 4, 4, 4\] but student float32 \[2, 3, 4, 4\]"),
        (dict(student=torch.zeros(3), target=torch.zeros(3)), "at least one more"),
        (dict(normalize="max"), "normalize='max'"),
        (dict(scale=torch.tensor(1.0)), "needs normalize='power'"),
        (dict(normalize="power", scale=torch.ones(1)), "0-dim"),
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
