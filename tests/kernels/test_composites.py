"""correlation against a formula of torch.corrcoef in float64."""

import pytest
import torch
from torch.nn import functional as F

from stablekd_fast.kernels import correlation, correlation_with_grad
from tests.kernels.precision import assert_as_exact_as_pytorch

pytestmark = pytest.mark.parametrize("level", ["baseline"], indirect=True)  # it does not use the core


def pearson(student, teacher, temperature=1.0):
    q, p = torch.softmax(student / temperature, 1), torch.softmax(teacher / temperature, 1)
    rows = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(q, p)])
    columns = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(q.T, p.T)])
    return temperature**2 * ((1 - rows).mean() + (1 - columns).mean())


def logits(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return tuple((3 * torch.randn(6, 11, generator=generator)).to(dtype) for _ in range(2))


def test_agrees_with_the_formula():
    for seed in range(5):
        operands = logits(seed, torch.float64)
        student = operands[0].clone().requires_grad_()
        expected = pearson(student, operands[1])
        (expected_grad,) = torch.autograd.grad(expected, student)
        torch.testing.assert_close(correlation(*operands), expected.detach())
        upstream = torch.tensor(0.5, dtype=torch.float64)
        value, grad = correlation_with_grad(*operands, upstream=upstream, scale=3.0)
        torch.testing.assert_close(value, 1.5 * expected.detach())
        torch.testing.assert_close(grad, 1.5 * expected_grad)
        assert not value.requires_grad and not grad.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_exact_as_pytorch(dtype):
    def plain(student, teacher):  # corrcoef has no bf16
        q, p = torch.softmax(student, 1), torch.softmax(teacher, 1)
        pairs = [(q - q.mean(d, keepdim=True), p - p.mean(d, keepdim=True)) for d in (1, 0)]
        return sum(1 - F.cosine_similarity(*pair, dim=d).mean() for pair, d in zip(pairs, (1, 0)))

    assert_as_exact_as_pytorch(correlation_with_grad, plain, [logits(seed, dtype) for seed in range(4)])


def test_first_and_second_derivatives():
    inputs = tuple(x[:2].clone().requires_grad_() for x in logits(0, torch.float64))
    assert torch.autograd.gradcheck(correlation, inputs)
    assert torch.autograd.gradgradcheck(correlation, inputs)


def test_upstream_gradient_and_memory_format():
    student, target = logits()
    student = student.T.contiguous().T.requires_grad_()
    (-3 * correlation(student, target)).backward()
    grad = -3 * correlation_with_grad(student, target)[1]
    torch.testing.assert_close(student.grad, grad)
    assert grad.stride() == student.stride()


def test_compiles_without_a_break():
    operands = logits()
    expected = correlation_with_grad(*operands)
    torch.compiler.reset()

    def forward(student, target):
        leaf = student * 1.0
        return correlation(leaf, target)

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    student = operands[0].clone().requires_grad_()
    value = compiled(student, operands[1])
    torch.testing.assert_close(value.detach(), expected[0])
    torch.testing.assert_close(torch.autograd.grad(value, student)[0], expected[1])


def test_extremes_stay_finite():
    student, target = logits()
    zero = torch.zeros_like(student)
    for a, b in ((zero, target), (student, torch.zeros_like(target)), (zero, torch.zeros_like(target))):
        value, grad = correlation_with_grad(a, b)
        assert value.isfinite() and grad.isfinite().all()
    student[0, 0], target[1, 1], student[2, 2] = 1e4, 1e4, -1e4
    for temperature in (0.5, 20.0):
        value, grad = correlation_with_grad(student, target, temperature=temperature)
        assert value.isfinite() and grad.isfinite().all()


def test_never_waits_for_the_device():
    operands = tuple(x.to("meta") for x in logits())
    loss, grad = correlation_with_grad(*operands)
    assert loss.shape == () and grad.shape == operands[0].shape


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: correlation(*logits(), temperature=0.0), "temperature=0.0"),
        (lambda: correlation_with_grad(*logits(), upstream=torch.ones(1)), "0-dim"),
    ],
)
def test_unusable_operands_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
