"""decoupled_kl against the two divergences of its definition, in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from stablekd_fast.kernels import decoupled_kl, decoupled_kl_with_grad, kd_loss
from stablekd_fast.kernels.decoupled_kl import reference
from stablekd_fast.kernels.decoupled_kl.reference import Operands
from tests.kernels.precision import assert_as_exact_as_pytorch, poisoned


def plain_loss(student, teacher, labels, temperature=4.0, alpha=1.0, beta=8.0):
    """Two-way probabilities by adding up, and the others' by leaving the label's column out."""
    one_hot = F.one_hot(labels, student.shape[1]).bool()
    q, p = (torch.softmax(x / temperature, 1) for x in (student, teacher))
    two_way = [torch.stack((x[one_hot], (x * ~one_hot).sum(1)), 1) for x in (p, q)]
    target = (two_way[0] * (two_way[0].log() - two_way[1].log())).sum(1)
    others = [x[~one_hot].view(len(x), -1) / temperature for x in (student, teacher)]
    rest = F.kl_div(F.log_softmax(others[0], 1), F.softmax(others[1], 1), reduction="none").sum(1)
    return (temperature**2 * (alpha * target + beta * rest)).mean()


def operands(n=6, c=11, dtype=torch.float32, seed=0, size=3.0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (size * torch.randn(n, c, generator=generator) for _ in range(2))
    return student.to(dtype), teacher.to(dtype), torch.randint(c, (n,), generator=generator)


@given(
    n=st.integers(1, 9),
    c=st.integers(2, 130),
    temperature=st.sampled_from([0.5, 1.0, 4.0, 20.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_agrees_with_float64(n, c, temperature, dtype):
    student, teacher, labels = operands(n, c, dtype, seed=n * c)
    settings = dict(temperature=temperature, alpha=0.7, beta=3.0)
    exact = student.double().requires_grad_()
    expected = 2.5 * plain_loss(exact, teacher.double(), labels, **settings)
    (expected_grad,) = torch.autograd.grad(expected, exact)
    loss, grad = decoupled_kl_with_grad(student, teacher, labels, scale=2.5, **settings)
    epsilon = torch.finfo(torch.float32).eps
    inexact = 64 * epsilon * (1 + 12 / temperature)
    torch.testing.assert_close(
        loss.double(), expected.detach(), rtol=8 * epsilon, atol=inexact * max(1, temperature**2)
    )
    atol = inexact * max(1, temperature) / n + torch.finfo(dtype).smallest_normal
    torch.testing.assert_close(grad.double(), expected_grad, rtol=torch.finfo(dtype).eps, atol=atol)


# At temperature 1 the plain formula takes the logarithm of 0 in float16.
@pytest.mark.parametrize(
    "temperature, dtype",
    [
        (1.0, torch.float32),
        (1.0, torch.bfloat16),
        (4.0, torch.float32),
        (4.0, torch.bfloat16),
        (4.0, torch.float16),
        (20.0, torch.float32),
        (20.0, torch.float16),
    ],
)
def test_as_exact_as_pytorch(dtype, temperature):
    labels = operands(64, 257)[2]

    def plain(student, teacher):
        return plain_loss(student, teacher, labels, temperature)

    def fused(student, teacher):
        return decoupled_kl_with_grad(student, teacher, labels, temperature=temperature)

    assert_as_exact_as_pytorch(fused, plain, [operands(64, 257, dtype, seed)[:2] for seed in range(16)])


def test_weighted_by_the_teacher_it_is_the_whole_divergence():
    # KL = TCKD + (1 - p of the label) * NCKD, row by row.
    student, teacher, labels = operands(1, 11, torch.float64)
    rest = 1 - torch.softmax(teacher / 4, 1)[0, labels].item()
    torch.testing.assert_close(decoupled_kl(student, teacher, labels, alpha=1.0, beta=rest), kd_loss(student, teacher))


@pytest.mark.parametrize("size", [1e4, -1e4])
@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_extreme_logits(size, temperature):
    student, teacher, labels = operands()
    student[0, labels[0]], teacher[1, labels[1]], student[2, 0], teacher[3, 0] = size, size, size, size
    loss, grad = decoupled_kl_with_grad(student, teacher, labels, temperature=temperature)
    exact = student.double().requires_grad_()
    expected = reference.decoupled_kl(Operands(exact, teacher.double(), labels, temperature, 1.0, 8.0))
    (expected_grad,) = torch.autograd.grad(expected, exact)
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-4, atol=1e-5)


def test_masked_classes_are_as_if_absent():
    student, teacher, _ = operands()
    keep = torch.tensor([0, 2, 3, 5, 6, 7, 10])
    labels = torch.tensor([0, 1, 2, 3, 4, 5])
    masked_student, masked_teacher = (torch.full_like(x, -torch.inf) for x in (student, teacher))
    masked_student[:, keep], masked_teacher[:, keep] = student[:, keep], teacher[:, keep]
    loss, grad = decoupled_kl_with_grad(masked_student, masked_teacher, keep[labels])
    short_loss, short_grad = decoupled_kl_with_grad(student[:, keep], teacher[:, keep], labels)
    torch.testing.assert_close(loss, short_loss)
    torch.testing.assert_close(grad[:, keep], short_grad)
    assert not grad.isnan().any() and grad.count_nonzero() == grad[:, keep].count_nonzero()


def test_first_and_second_derivatives():
    student, teacher, labels = operands(3, 4, torch.float64)
    inputs = (student.requires_grad_(), teacher.requires_grad_())

    def loss(student, teacher):
        return decoupled_kl(student, teacher, labels)

    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(lambda student: loss(student, inputs[1]).square(), inputs[:1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_backward_honours_the_upstream_gradient(dtype):
    student, teacher, labels = operands(dtype=dtype)
    student.requires_grad_()
    (-3 * decoupled_kl(student, teacher, labels)).backward()
    for options in (dict(scale=-3.0), dict(scale=1.5, upstream=torch.tensor(-2.0))):
        torch.testing.assert_close(student.grad, decoupled_kl_with_grad(student, teacher, labels, **options)[1])


@pytest.mark.parametrize("classes", [2, 7, 8, 33, 1030])
def test_every_element_is_written(classes, monkeypatch):
    student, teacher, labels = operands(5, classes)
    poisoned(monkeypatch)
    loss, grad = decoupled_kl_with_grad(student, teacher, labels)
    assert loss.isfinite() and grad.isfinite().all()


def test_operands_need_not_be_contiguous():
    student, teacher, labels = operands(8, 12)
    strided = decoupled_kl_with_grad(student[::2, ::3], teacher[::2, ::3], labels[::2] % 4)
    dense = decoupled_kl_with_grad(student[::2, ::3].contiguous(), teacher[::2, ::3].contiguous(), labels[::2] % 4)
    assert torch.equal(strided[0], dense[0]) and torch.equal(strided[1], dense[1])


def test_never_waits_for_the_device():
    # Meta tensors have no values, so anything that reads one back to the host raises.
    student, teacher, labels = (x.to("meta") for x in operands())
    loss, grad = reference.decoupled_kl_with_grad(Operands(student, teacher, labels, 4.0, 1.0, 8.0), 1.0, None)
    assert loss.shape == () and grad.shape == student.shape


def test_opcheck():
    student, teacher, labels = operands(3, 4)
    student.requires_grad_()
    settings = (labels, 4.0, 1.0, 8.0)
    torch.library.opcheck(torch.ops.stablekd.decoupled_kl.default, (student, teacher, *settings))
    torch.library.opcheck(
        torch.ops.stablekd.decoupled_kl_with_grad.default, (student, teacher, *settings, 2.0, torch.tensor(0.5))
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(teacher_logits=torch.zeros(6, 10)), r"teacher_logits is float32 \[6, 10\]"),
        (dict(student_logits=torch.zeros(6, 1)), "at least two classes"),
        (dict(labels=torch.zeros(6)), r"labels is float32 \[6\]; it must be int64 \[6\]"),
        (dict(temperature=0.0), "temperature=0.0"),
    ],
)
def test_unusable_operands_are_named(change, message):
    student, teacher, labels = operands()
    arguments = dict(student_logits=student, teacher_logits=teacher, labels=labels) | change
    for operator in (decoupled_kl, decoupled_kl_with_grad):
        with pytest.raises(ValueError, match=message):
            operator(**arguments)


@pytest.mark.parametrize("label", [-1, 11])
def test_labels_that_are_no_class_are_named(label):
    student, teacher, labels = operands()
    labels[3] = label
    with pytest.raises((ValueError, RuntimeError), match=rf"labels\[3\] is {label}|out of bounds"):
        decoupled_kl_with_grad(student, teacher, labels)


@pytest.mark.gpu
def test_same_on_the_gpu_without_waiting():
    student, teacher, labels = operands(64, 100)
    expected = decoupled_kl_with_grad(student, teacher, labels)
    on_gpu = [x.cuda() for x in (student, teacher, labels)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = decoupled_kl_with_grad(*on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(tuple(x.cpu() for x in got), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [1000, 1003])
def test_gradients_too_large_for_the_caches(classes, dtype, monkeypatch):
    """They are written past the caches, by whole vectors: rows and labels lie at every place of one."""
    student, teacher, labels = operands(17200 // dtype.itemsize, classes, dtype)
    exact = student.double().requires_grad_()
    expected = plain_loss(exact, teacher.double(), labels)
    (gradient,) = torch.autograd.grad(expected, exact)
    poisoned(monkeypatch)
    loss, grad = decoupled_kl_with_grad(student, teacher, labels)
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=0)
    largest = gradient.abs().amax().item()
    torch.testing.assert_close(grad.double(), gradient, rtol=torch.finfo(dtype).eps, atol=4e-6 * largest)
