"""The Triton kernel of grouped_kl against the reference in float64, and as exact as plain PyTorch."""

from itertools import product

import pytest
import torch

from stablekd_fast.kernels import _triton_finish
from stablekd_fast.kernels.grouped_kl import reference
from stablekd_fast.kernels.grouped_kl import triton_impl as kernels
from stablekd_fast.kernels.grouped_kl.reference import Operands
from tests.kernels.precision import assert_as_exact_as_pytorch, poisoned

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# NumPy, which interprets the kernels, remarks on lanes whose values are never used.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow) encountered:RuntimeWarning")


def operands(
    device, n=5, c=33, dtypes=(torch.float32, torch.float32), seed=0, size=3.0, temperature=4.0, threshold=0.9
):
    """Draw logits whose primary groups do not hang on roundings of the last class that is taken."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (size * torch.randn(4 * n, c, generator=generator) for _ in range(2))
    student, teacher = student.to(dtypes[0]), teacher.to(dtypes[1])
    ordered = torch.softmax(teacher.double() / temperature, 1).sort(1, descending=True).values.cumsum(1)
    clear = (ordered - threshold).abs().amin(1) > 2e-6
    return student[clear][:n].to(device), teacher[clear][:n].to(device)


def check(student, teacher, temperature=4.0, threshold=0.9, primary=0.7, binary=2.5, upstream=None):
    """Loss and gradient against the reference on the same operands in float64."""
    settings = (temperature, threshold, primary, binary)
    expected_loss, expected_grad = reference.grouped_kl_with_grad(
        Operands(student.double(), teacher.double(), *settings), 2.0, upstream
    )
    loss, grad = kernels.grouped_kl_with_grad(Operands(student, teacher, *settings), 2.0, upstream)
    assert loss.dtype == torch.float32 and loss.shape == () and grad.dtype == student.dtype
    assert grad.stride() == torch.empty_like(student).stride()

    epsilon, scale = torch.finfo(torch.float32).eps, 2 * abs(1.0 if upstream is None else upstream.item())
    logits = torch.cat([x[x.isfinite()].abs() for x in (student, teacher)]).max().item()
    inexact = 8 * scale * (primary + binary) * epsilon * (1 + logits / temperature)
    torch.testing.assert_close(
        loss.double(), expected_loss.double(), rtol=8 * epsilon, atol=inexact * max(1, temperature**2)
    )
    finfo = torch.finfo(student.dtype)
    atol = inexact * max(1, temperature) / len(student) + finfo.smallest_normal
    torch.testing.assert_close(grad.double(), expected_grad, rtol=finfo.eps, atol=atol)

    alone = kernels.grouped_kl(Operands(student, teacher, *settings))
    assert torch.equal(alone, kernels.grouped_kl_with_grad(Operands(student, teacher, *settings), 1.0, None)[0])


@pytest.mark.parametrize("dtypes", list(product(FLOATS, FLOATS)), ids=str)
def test_agrees_with_float64(device, dtypes):
    student, teacher = operands(device, 5, 33, dtypes)
    for dtype in (torch.float32, torch.float64):
        check(student, teacher, upstream=torch.tensor(-3.0, device=device, dtype=dtype))


@pytest.mark.parametrize("classes", [1, 2, 3, 16, 100, 136, 1000, 4100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_classes(device, classes, dtype):
    check(*operands(device, 3, classes, (dtype, dtype)))


@pytest.mark.parametrize("temperature, threshold", [(0.5, 0.9), (1.0, 0.2), (20.0, 0.5), (4.0, 0.99)])
def test_temperatures_and_thresholds(device, temperature, threshold):
    drawn = operands(device, temperature=temperature, threshold=threshold)
    check(*drawn, temperature, threshold)
    check(*drawn, temperature, threshold, primary=1.0, binary=0.0)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_as_exact_as_pytorch(device, dtype, temperature):
    def plain(student, teacher):
        return reference.grouped_kl(Operands(student, teacher, temperature, 0.9, 1.0, 2.0))

    def fused(student, teacher):
        return kernels.grouped_kl_with_grad(Operands(student, teacher, temperature, 0.9, 1.0, 2.0), 1.0, None)

    draws = [operands(device, 16, 100, (dtype, dtype), seed, temperature=temperature) for seed in range(6)]
    assert_as_exact_as_pytorch(fused, plain, draws)


@pytest.mark.parametrize("classes", [3, 20, 300])
@pytest.mark.parametrize("distinct", [1, 2, 7])
@pytest.mark.parametrize("threshold", [0.317, 0.937])
def test_of_equal_classes_the_first_are_taken(device, classes, distinct, threshold):
    generator = torch.Generator().manual_seed(classes)
    teacher = torch.randint(distinct, (9, classes), generator=generator).float() / 4 - 1
    teacher[::2] *= -1  # zeros of both signs are equal
    p = torch.softmax(teacher.double() / 4, 1).sort(1, descending=True).values.cumsum(1)
    teacher = teacher[(p - threshold).abs().amin(1) > 1e-6].to(device)
    student = torch.randn(len(teacher), classes, generator=generator).to(device)
    check(student, teacher, 4.0, threshold)


@pytest.mark.parametrize("classes", [12, 1000])
def test_masked_classes(device, classes):
    student, teacher = operands(device, 4, classes)
    student[:, 1], teacher[:, 1] = -torch.inf, -torch.inf
    teacher[1, 2] = -torch.inf
    student[3, 6:], teacher[3, 6:] = -torch.inf, -torch.inf
    check(student, teacher)
    # A group that only the student excludes, and a class of one.
    teacher[2, 4], student[2, 4], student[0, teacher[0].argmax()] = 200.0, -torch.inf, -torch.inf
    loss, grad = kernels.grouped_kl_with_grad(Operands(student, teacher, 4.0, 0.9, 1.0, 1.0), 1.0, None)
    assert loss == torch.inf and grad.isfinite().all()


@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_extreme_logits(device, temperature):
    student, teacher = operands(device, 6, 33, size=1.0, temperature=temperature)
    student[0, 0], student[1, 2], teacher[2, 3], teacher[3, 4] = 1e4, -1e4, 1e4, -1e4
    student[4, 2], teacher[5, 2] = 1e4, 1e4
    check(student, teacher, temperature)
    check(student + 1e4, teacher - 1e4, temperature)


def test_operands_need_not_be_contiguous(device):
    student, teacher = operands(device, 8, 36)
    check(student[::2, ::3], teacher[::2, ::3])
    check(student.t().contiguous().t(), teacher)
    check(student[:, 1:20], teacher[:, 2:21])
    check(student[1:], teacher[:1].expand(7, -1))


def test_many_rows(device):
    check(*operands(device, 130, 7))


@pytest.mark.parametrize("classes", [7, 33])
def test_every_element_is_written(device, classes, monkeypatch):
    student, teacher = operands(device, 3, classes)
    poisoned(monkeypatch)
    loss, grad = kernels.grouped_kl_with_grad(Operands(student, teacher, 4.0, 0.9, 1.0, 1.0), 1.0, None)
    assert loss.isfinite() and grad.isfinite().all()


@pytest.mark.parametrize(
    "dtype, rows, classes", [(torch.float64, 3, 5), (torch.float32, 0, 5), (torch.float32, 2, 8200)]
)
def test_what_is_left_to_the_reference(device, launches, dtype, rows, classes):
    """Double precision, empty batches, and rows that do not fit into registers."""
    given = Operands(*(x[:rows] for x in operands(device, 3, classes, (dtype, dtype))), 4.0, 0.9, 1.0, 1.0)
    got = kernels.grouped_kl_with_grad(given, 2.0, None)
    expected = reference.grouped_kl_with_grad(given, 2.0, None)
    torch.testing.assert_close(got, expected, equal_nan=True)
    torch.testing.assert_close(kernels.grouped_kl(given) * 2, expected[0], equal_nan=True)
    assert not launches


def test_the_host_never_waits(monkeypatch):
    # Meta tensors have no values, so anything that reads one back to the host raises.
    monkeypatch.setattr(kernels, "launch", lambda *_: None)
    monkeypatch.setattr(_triton_finish, "launch", lambda *_: None)
    student, teacher = (torch.empty(5, 33, device="meta") for _ in range(2))
    upstream = torch.tensor(-3.0, dtype=torch.float64, device="meta")
    loss, grad = kernels.grouped_kl_with_grad(Operands(student, teacher, 4.0, 0.9, 1.0, 1.0), 2.0, upstream)
    assert loss.shape == () and grad.shape == student.shape


def test_variants_are_listed_once():
    listed = [entry.variant for entry in kernels.specialisations()]
    assert len(listed) == len(set(listed))
