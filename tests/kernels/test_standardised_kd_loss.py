"""standardised_kd_loss against its definition in plain PyTorch, in float64."""

import pytest
import torch
from torch.nn import functional as F

from stablekd_fast.kernels import kd_loss, standardised_kd_loss, standardised_kd_loss_with_grad
from stablekd_fast.kernels.standardised_kd_loss import reference
from stablekd_fast.kernels.standardised_kd_loss.reference import Operands
from tests.kernels.precision import assert_as_exact_as_pytorch

pytestmark = pytest.mark.parametrize("level", ["baseline"], indirect=True)  # it does not use the core

WEIGHTS = dict(temperature=2.0, kl_weight=9.0, ce_weight=0.7)


def operands(n=6, c=11, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = ((3 * torch.randn(n, c, generator=generator) + 1).to(dtype) for _ in range(2))
    return student, teacher, torch.randint(c, (n,), generator=generator)


def plain_loss(student, teacher, labels, temperature=2.0, kl_weight=9.0, ce_weight=0.7):
    a, b = ((x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-7) / temperature for x in (student, teacher))
    loss = kl_weight * temperature**2 * F.kl_div(a.log_softmax(1), b.softmax(1), reduction="batchmean")
    return loss if labels is None else loss + ce_weight * F.cross_entropy(student, labels)


@pytest.mark.parametrize("with_labels", [True, False])
@pytest.mark.parametrize("shape", [(6, 11), (1, 2), (9, 130)])
def test_agrees_with_the_formula(shape, with_labels):
    student, teacher, labels = operands(*shape, torch.float64)
    labels = labels if with_labels else None
    leaf = student.clone().requires_grad_()
    expected = plain_loss(leaf, teacher, labels)
    (expected_grad,) = torch.autograd.grad(expected, leaf)
    torch.testing.assert_close(standardised_kd_loss(student, teacher, labels, **WEIGHTS), expected.detach())
    loss, gradient = standardised_kd_loss_with_grad(
        student, teacher, labels, **WEIGHTS, scale=3.0, upstream=torch.tensor(-0.5)
    )
    torch.testing.assert_close((loss, gradient), (-1.5 * expected.detach(), -1.5 * expected_grad))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_exact_as_pytorch(dtype):
    draws = [operands(16, 100, dtype, seed) for seed in range(6)]
    draws = [(student, teacher, labels.double()) for student, teacher, labels in draws]  # as the test converts them
    assert_as_exact_as_pytorch(
        lambda s, t, y: standardised_kd_loss_with_grad(s, t, y.long(), **WEIGHTS),
        lambda s, t, y: plain_loss(s, t, y.long()),
        draws,
    )


def test_first_and_second_derivatives():
    student, teacher, labels = operands(3, 5, torch.float64)
    inputs = (student.requires_grad_(), teacher.requires_grad_())
    assert torch.autograd.gradcheck(lambda s, t: standardised_kd_loss(s, t, labels), inputs)
    assert torch.autograd.gradgradcheck(lambda s, t: standardised_kd_loss(s, t, labels), inputs)


def test_scale_and_shift_of_a_row_change_only_the_cross_entropy():
    student, teacher, labels = operands(dtype=torch.float64)
    moved = student * torch.tensor([0.5, 1, 2, 3, 4, 5])[:, None] + 7
    for weights in (dict(kl_weight=2.0, ce_weight=0.0), dict(kl_weight=2.0, ce_weight=1.0)):
        found = standardised_kd_loss(moved, teacher, labels, **weights)
        other = standardised_kd_loss(student, teacher, labels, **weights)
        hard = kd_loss(moved, moved, labels, alpha=0.0) - kd_loss(student, student, labels, alpha=0.0)
        torch.testing.assert_close(found - other, weights["ce_weight"] * hard, rtol=1e-6, atol=1e-6)


def test_a_row_that_does_not_vary():
    """Its gradient is what autograd makes of the formula."""
    student, teacher, labels = operands(dtype=torch.float64)
    student[0] = 0.0
    leaf = student.clone().requires_grad_()
    (expected,) = torch.autograd.grad(plain_loss(leaf, teacher, labels), leaf)
    gradient = standardised_kd_loss_with_grad(student, teacher, labels, **WEIGHTS)[1]
    assert gradient.isfinite().all()
    torch.testing.assert_close(gradient, expected)


def test_opcheck():
    student, teacher, labels = operands(3, 4)
    student.requires_grad_()
    settings = (2.0, 9.0, 1.0)
    torch.library.opcheck(torch.ops.stablekd.standardised_kd_loss.default, (student, teacher, labels, *settings))
    torch.library.opcheck(
        torch.ops.stablekd.standardised_kd_loss_with_grad.default,
        (student, teacher, None, *settings, 2.0, torch.tensor(0.5)),
    )


def test_never_waits_for_the_device():
    # Meta tensors have no values, so anything that reads one back to the host raises.
    student, teacher, labels = (x.to("meta") for x in operands())
    given = Operands(student, teacher, labels, 2.0, 9.0, 1.0)
    loss, grad = reference.standardised_kd_loss_with_grad(given, 1.0, None)
    assert loss.shape == () and grad.shape == student.shape


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(teacher_logits=torch.zeros(6, 10)), r"teacher_logits is float32 \[6, 10\]"),
        (dict(labels=torch.zeros(5, dtype=torch.int64)), r"labels is int64 \[5\]"),
        (dict(temperature=0.0), "temperature=0.0"),
    ],
)
def test_unusable_operands_are_named(change, message):
    student, teacher, labels = operands()
    arguments = dict(student_logits=student, teacher_logits=teacher, labels=labels) | change
    for operator in (standardised_kd_loss, standardised_kd_loss_with_grad):
        with pytest.raises(ValueError, match=message):
            operator(**arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(128, 10), (128, 100), (64, 4096), (16, 21841)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_on_the_gpu_without_waiting(shape, dtype):
    """Also from a CUDA graph, and to the bit when it is done again."""
    student, teacher, labels = operands(*shape, dtype)
    expected = standardised_kd_loss_with_grad(student.double(), teacher.double(), labels, **WEIGHTS)
    on_gpu = [x.cuda() for x in (student, teacher, labels)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = standardised_kd_loss_with_grad(*on_gpu, **WEIGHTS)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(got[0].cpu().double(), expected[0], rtol=1e-5, atol=0)
    largest = expected[1].abs().max().item()
    torch.testing.assert_close(got[1].cpu().double(), expected[1], rtol=torch.finfo(dtype).eps, atol=1e-4 * largest)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = standardised_kd_loss_with_grad(*on_gpu, **WEIGHTS)
    graph.replay()
    assert torch.equal(captured[0], got[0]) and torch.equal(captured[1], got[1])
