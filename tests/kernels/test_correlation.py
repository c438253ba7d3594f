"""correlation as an operator; its formula, gradients and extremes are tested with the composites."""

import pytest
import torch

from stablekd_fast.kernels import correlation, correlation_with_grad
from stablekd_fast.kernels.correlation import reference
from stablekd_fast.kernels.correlation.reference import Operands

pytestmark = pytest.mark.parametrize("level", ["baseline"], indirect=True)  # it does not use the core


def operands(n=6, c=11, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = ((3 * torch.randn(n, c, generator=generator)).to(dtype) for _ in range(2))
    return student, teacher


@pytest.mark.parametrize("settings", [(1.0, 1.0, 1.0), (0.5, 0.3, 0.0), (4.0, 0.0, 2.0)])
@pytest.mark.parametrize("shape", [(6, 11), (1, 5), (5, 1), (2, 2)])
def test_the_closed_form_is_the_derivative(settings, shape):
    student, teacher = operands(*shape, torch.float64)
    leaf = student.clone().requires_grad_()
    value = reference.correlation(Operands(leaf, teacher, *settings))
    (expected,) = torch.autograd.grad(value, leaf)
    loss, gradient = reference.correlation_with_grad(Operands(student, teacher, *settings), 2.0, torch.tensor(-1.5))
    torch.testing.assert_close((loss, gradient), (-3 * value.detach(), -3 * expected))


def test_opcheck():
    student, teacher = operands(3, 4)
    student.requires_grad_()
    torch.library.opcheck(torch.ops.stablekd.correlation.default, (student, teacher, 2.0, 1.0, 0.5))
    torch.library.opcheck(
        torch.ops.stablekd.correlation_with_grad.default,
        (student, teacher, 2.0, 1.0, 0.5, 2.0, torch.tensor(0.5)),
    )


def test_empty_batches():
    student, teacher = (x[:0] for x in operands())
    loss, gradient = correlation_with_grad(student, teacher)
    assert loss.isnan() and gradient.shape == (0, 11)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(128, 10), (128, 100), (70, 1000), (512, 21841)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_on_the_gpu_without_waiting(shape, dtype):
    """Also from a CUDA graph, and to the bit when it is done again."""
    student, teacher = operands(*shape, dtype)
    expected = reference.correlation_with_grad(Operands(student.double(), teacher.double(), 1.0, 1.0, 1.0), 1.0, None)
    on_gpu = [x.cuda() for x in (student, teacher)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = correlation_with_grad(*on_gpu)
        alone = correlation(*on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(got[0].cpu().double(), expected[0], rtol=1e-5, atol=0)
    largest = expected[1].abs().max().item()
    torch.testing.assert_close(got[1].cpu().double(), expected[1], rtol=torch.finfo(dtype).eps, atol=1e-4 * largest)
    assert torch.equal(alone, got[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = correlation_with_grad(*on_gpu)
    graph.replay()
    assert torch.equal(captured[0], got[0]) and torch.equal(captured[1], got[1])
