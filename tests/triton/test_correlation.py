"""The Triton kernels of correlation against the reference in float64, and as exact as plain PyTorch."""

from itertools import product

import pytest
import torch
from torch.nn import functional as F

from stablekd_fast.kernels import _triton_finish
from stablekd_fast.kernels.correlation import reference
from stablekd_fast.kernels.correlation import triton_impl as kernels
from stablekd_fast.kernels.correlation.reference import Operands
from tests.kernels.precision import assert_as_exact_as_pytorch, poisoned

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# NumPy, which interprets the kernels, remarks on lanes whose values are never used.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow) encountered:RuntimeWarning")


def operands(device, n=5, c=33, dtypes=(torch.float32, torch.float32), seed=0, size=3.0):
    generator = torch.Generator().manual_seed(seed)
    drawn = (size * torch.randn(n, c, generator=generator) for _ in range(2))
    student, teacher = (x.to(device, dtype) for x, dtype in zip(drawn, dtypes))
    return student, teacher


def check(student, teacher, temperature=1.0, inter=0.7, intra=2.5, upstream=None):
    """Loss and gradient against the reference on the same operands in float64."""
    settings = (temperature, inter, intra)
    expected_loss, expected_grad = reference.correlation_with_grad(
        Operands(student.double(), teacher.double(), *settings), 2.0, upstream
    )
    loss, grad = kernels.correlation_with_grad(Operands(student, teacher, *settings), 2.0, upstream)
    assert loss.dtype == torch.float32 and loss.shape == () and grad.dtype == student.dtype
    assert grad.stride() == torch.empty_like(student).stride()

    epsilon, scale = torch.finfo(torch.float32).eps, 2 * abs(1.0 if upstream is None else upstream.item())
    logits = torch.cat([x[x.isfinite()].abs() for x in (student, teacher)]).max().item()
    inexact = 8 * scale * (inter + intra) * epsilon * (1 + logits / temperature) * max(1, temperature) ** 2
    torch.testing.assert_close(loss.double(), expected_loss.double(), rtol=0, atol=inexact)
    finfo = torch.finfo(student.dtype)
    weights = inter / len(student) + intra / student.shape[1]
    atol = 8 * scale * weights * epsilon * (1 + logits / temperature) * max(1, temperature) + finfo.smallest_normal
    # Rows and columns that hardly vary make roundings larger, the reference's in float32 too.
    in_float32 = reference.correlation_with_grad(Operands(student.float(), teacher.float(), *settings), 2.0, upstream)
    atol = max(atol, 4 * (in_float32[1] - expected_grad).abs().max().item())
    torch.testing.assert_close(grad.double(), expected_grad, rtol=finfo.eps, atol=atol)

    alone = kernels.correlation(Operands(student, teacher, *settings))
    assert torch.equal(alone, kernels.correlation_with_grad(Operands(student, teacher, *settings), 1.0, None)[0])


@pytest.mark.parametrize("dtypes", list(product(FLOATS, FLOATS)), ids=str)
def test_agrees_with_float64(device, dtypes):
    student, teacher = operands(device, 5, 33, dtypes)
    for dtype in (torch.float32, torch.float64):
        check(student, teacher, upstream=torch.tensor(-3.0, device=device, dtype=dtype))


@pytest.mark.parametrize("classes", [2, 3, 10, 16, 100, 136, 520, 1000, 2056])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_classes(device, classes, dtype):
    """Also those whose rows are read in chunks."""
    check(*operands(device, 3, classes, (dtype, dtype)))


def test_maxima_in_a_later_chunk(device):
    student, teacher = operands(device, 3, 1000)
    student[0, 900] = teacher[1, 950] = 15.0
    check(student, teacher)


@pytest.mark.parametrize("samples", [1, 3, 63, 64, 65, 200])
@pytest.mark.parametrize("classes", [10, 17])
def test_any_number_of_samples(device, samples, classes):
    """Also those whose columns are read in chunks."""
    check(*operands(device, samples, classes))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_temperatures_and_weights(device, temperature):
    student, teacher = operands(device, 70, 20)
    for inter, intra in ((0.7, 2.5), (1.0, 0.0), (0.0, 1.0)):
        check(student, teacher, temperature, inter, intra)


def plain(temperature):
    """The loss in plain PyTorch, which differentiates it."""

    def loss(student, teacher):
        q, p = torch.softmax(student / temperature, 1), torch.softmax(teacher / temperature, 1)
        apart = 0.0
        for axis in (1, 0):
            pair = (q - q.mean(axis, keepdim=True), p - p.mean(axis, keepdim=True))
            apart = apart + 1 - F.cosine_similarity(*pair, dim=axis).mean()
        return temperature**2 * apart

    return loss


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_as_exact_as_pytorch(device, dtype, temperature):
    def fused(student, teacher):
        return kernels.correlation_with_grad(Operands(student, teacher, temperature, 1.0, 1.0), 1.0, None)

    draws = [operands(device, 96, 100, (dtype, dtype), seed) for seed in range(6)]
    assert_as_exact_as_pytorch(fused, plain(temperature), draws)


def test_rows_and_columns_that_do_not_vary(device):
    """Their correlation is 0, and their derivative is finite."""
    student, teacher = operands(device, 70, 12)
    flat = torch.zeros_like(student)
    for one, other in ((flat, teacher), (student, flat), (flat, flat), (student[:1].expand(70, -1), teacher)):
        loss, grad = kernels.correlation_with_grad(Operands(one, other, 1.0, 1.0, 1.0), 1.0, None)
        assert loss.isfinite() and grad.isfinite().all()
    loss, _ = kernels.correlation_with_grad(Operands(flat, flat, 1.0, 1.0, 1.0), 1.0, None)
    assert loss == 2


@pytest.mark.parametrize("classes", [12, 1100])
def test_masked_classes(device, classes):
    student, teacher = operands(device, 6, classes)
    student[:, 1], teacher[:, 1] = -torch.inf, -torch.inf
    teacher[1, 2], student[2, 4] = -torch.inf, -torch.inf
    student[3, :-2], teacher[4, :-2] = -torch.inf, -torch.inf  # whole chunks
    check(student, teacher)


@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_extreme_logits(device, temperature):
    student, teacher = operands(device, 6, 33, size=1.0)
    student[0, 0], student[1, 2], teacher[2, 3], teacher[3, 4] = 1e4, -1e4, 1e4, -1e4
    student[4, 2], teacher[5, 2] = 1e4, 1e4
    check(student, teacher, temperature)


def test_operands_need_not_be_contiguous(device):
    student, teacher = operands(device, 8, 36)
    check(student[::2, ::3], teacher[::2, ::3])
    check(student.t().contiguous().t(), teacher)
    check(student[:, 1:20], teacher[:, 2:21])
    check(student[1:], teacher[:1].expand(7, -1))


@pytest.mark.parametrize("samples, classes", [(3, 7), (70, 33), (2, 1100)])
def test_every_element_is_written(device, samples, classes, monkeypatch):
    student, teacher = operands(device, samples, classes)
    poisoned(monkeypatch)
    loss, grad = kernels.correlation_with_grad(Operands(student, teacher, 1.0, 1.0, 1.0), 1.0, None)
    assert loss.isfinite() and grad.isfinite().all()


def test_launches(device, launches):
    given = Operands(*operands(device, 128, 10), 1.0, 1.0, 1.0)
    kernels.correlation_with_grad(given, 1.0, None)
    made = [one.kernel for one in launches]
    assert made == ["correlation_rows", "correlation_columns", "correlation_gradient", "sum_partials"]
    launches.clear()
    kernels.correlation(given)
    assert [one.kernel for one in launches] == ["correlation_rows", "correlation_columns", "sum_partials"]


@pytest.mark.parametrize("dtype, rows", [(torch.float64, 3), (torch.float32, 0)])
def test_what_is_left_to_the_reference(device, launches, dtype, rows):
    """Double precision, and empty batches."""
    given = Operands(*(x[:rows] for x in operands(device, 3, 5, (dtype, dtype))), 1.0, 1.0, 1.0)
    got = kernels.correlation_with_grad(given, 2.0, None)
    expected = reference.correlation_with_grad(given, 2.0, None)
    torch.testing.assert_close(got, expected, equal_nan=True)
    torch.testing.assert_close(kernels.correlation(given) * 2, expected[0], equal_nan=True)
    assert not launches


def test_the_host_never_waits(monkeypatch):
    # Meta tensors have no values, so anything that reads one back to the host raises.
    monkeypatch.setattr(kernels, "launch", lambda *_: None)
    monkeypatch.setattr(_triton_finish, "launch", lambda *_: None)
    student, teacher = (torch.empty(5, 33, device="meta") for _ in range(2))
    upstream = torch.tensor(-3.0, dtype=torch.float64, device="meta")
    loss, grad = kernels.correlation_with_grad(Operands(student, teacher, 1.0, 1.0, 1.0), 2.0, upstream)
    assert loss.shape == () and grad.shape == student.shape


def test_variants_are_listed_once():
    listed = [entry.variant for entry in kernels.specialisations()]
    assert len(listed) == len(set(listed))
