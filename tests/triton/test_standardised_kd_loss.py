"""The Triton kernel of standardised_kd_loss against the reference in float64, and as exact as plain PyTorch."""

from itertools import product

import pytest
import torch
from torch.nn import functional as F

from stablekd_fast.kernels import _triton_finish
from stablekd_fast.kernels.standardised_kd_loss import reference
from stablekd_fast.kernels.standardised_kd_loss import triton_impl as kernels
from stablekd_fast.kernels.standardised_kd_loss.reference import Operands
from tests.kernels.precision import assert_as_exact_as_pytorch, poisoned

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# NumPy, which interprets the kernels, remarks on lanes whose values are never used.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow) encountered:RuntimeWarning")


def operands(device, n=5, c=33, dtypes=(torch.float32, torch.float32), seed=0, size=3.0):
    generator = torch.Generator().manual_seed(seed)
    drawn = (size * torch.randn(n, c, generator=generator) + 1 for _ in range(2))
    student, teacher = (x.to(device, dtype) for x, dtype in zip(drawn, dtypes))
    return student, teacher, torch.randint(c, (n,), generator=generator).to(device)


def check(student, teacher, labels, temperature=2.0, kl_weight=9.0, ce_weight=0.7, upstream=None):
    """Loss and gradient against the reference on the same operands in float64."""
    settings = (labels, temperature, kl_weight, ce_weight)
    expected_loss, expected_grad = reference.standardised_kd_loss_with_grad(
        Operands(student.double(), teacher.double(), *settings), 2.0, upstream
    )
    loss, grad = kernels.standardised_kd_loss_with_grad(Operands(student, teacher, *settings), 2.0, upstream)
    assert loss.dtype == torch.float32 and loss.shape == () and grad.dtype == student.dtype
    assert grad.stride() == torch.empty_like(student).stride()

    epsilon, scale = torch.finfo(torch.float32).eps, 2 * abs(1.0 if upstream is None else upstream.item())
    in_float32 = reference.standardised_kd_loss_with_grad(
        Operands(student.float(), teacher.float(), *settings), 2.0, upstream
    )
    inexact = 8 * epsilon * scale * (kl_weight + ce_weight) * (1 + student.shape[1] ** 0.5 / temperature)
    atol = inexact * max(1, temperature**2) + 4 * (in_float32[0] - expected_loss).abs().item()
    torch.testing.assert_close(loss.double(), expected_loss.double(), rtol=8 * epsilon, atol=atol)
    finfo = torch.finfo(student.dtype)
    # Means and deviations of large logits are as inexact as the reference's in float32.
    atol = 4 * (in_float32[1] - expected_grad).abs().max().item() + finfo.smallest_normal
    atol = max(atol, inexact * max(1, temperature) / len(student))
    torch.testing.assert_close(grad.double(), expected_grad, rtol=finfo.eps, atol=atol)

    alone = kernels.standardised_kd_loss(Operands(student, teacher, *settings))
    assert torch.equal(
        alone, kernels.standardised_kd_loss_with_grad(Operands(student, teacher, *settings), 1.0, None)[0]
    )


@pytest.mark.parametrize("dtypes", list(product(FLOATS, FLOATS)), ids=str)
def test_agrees_with_float64(device, dtypes):
    student, teacher, labels = operands(device, 5, 33, dtypes)
    for dtype in (torch.float32, torch.float64):
        check(student, teacher, labels, upstream=torch.tensor(-3.0, device=device, dtype=dtype))
    check(student, teacher, None)


@pytest.mark.parametrize("classes", [2, 3, 10, 16, 100, 136, 1000, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_classes(device, classes, dtype):
    check(*operands(device, 3, classes, (dtype, dtype)))


@pytest.mark.parametrize("temperature", [0.5, 2.0, 20.0])
def test_temperatures_and_weights(device, temperature):
    drawn = operands(device)
    check(*drawn, temperature)
    check(*drawn, temperature, kl_weight=1.0, ce_weight=0.0)
    check(*drawn, temperature, kl_weight=0.0, ce_weight=1.0)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 20.0])
def test_as_exact_as_pytorch(device, dtype, temperature):
    def standardised(logits):
        return (logits - logits.mean(1, keepdim=True)) / (logits.std(1, keepdim=True) + 1e-7)

    def plain(student, teacher, labels):
        log_q, p = (standardised(x) / temperature for x in (student, teacher))
        divergence = F.kl_div(log_q.log_softmax(1), p.softmax(1), reduction="batchmean")
        return 9 * temperature**2 * divergence + F.cross_entropy(student, labels)

    def fused(student, teacher, labels):
        return kernels.standardised_kd_loss_with_grad(
            Operands(student, teacher, labels, temperature, 9.0, 1.0), 1.0, None
        )

    draws = [operands(device, 16, 100, (dtype, dtype), seed) for seed in range(6)]
    draws = [(student, teacher, labels.double()) for student, teacher, labels in draws]  # as the test converts them
    assert_as_exact_as_pytorch(lambda s, t, y: fused(s, t, y.long()), lambda s, t, y: plain(s, t, y.long()), draws)


def test_large_and_shifted_logits(device):
    student, teacher, labels = operands(device, 6, 33)
    student[0, 0], student[1, 2], teacher[2, 3], teacher[3, 4] = 1e4, -1e4, 1e4, -1e4
    check(student, teacher, labels)
    check(student + 1e3, teacher - 1e3, labels)


def test_rows_that_do_not_vary(device):
    """They have no deviation: their gradient is that of the cross entropy, and of the divergence a finite one."""
    student, teacher, labels = operands(device, 6, 16)
    flat = torch.zeros_like(student)
    check(flat, teacher, labels)
    check(student, flat, labels)
    check(flat, flat, labels)


def test_operands_need_not_be_contiguous(device):
    student, teacher, labels = operands(device, 8, 36)
    check(student[::2, ::3], teacher[::2, ::3], labels[::2] % 12)
    check(student.t().contiguous().t(), teacher, labels)
    check(student[:, 1:20], teacher[:, 2:21], labels % 19)
    check(student[1:], teacher[:1].expand(7, -1), labels[1:])


def test_many_rows(device):
    check(*operands(device, 130, 7))


@pytest.mark.parametrize("classes", [7, 33])
def test_every_element_is_written(device, classes, monkeypatch):
    student, teacher, labels = operands(device, 3, classes)
    poisoned(monkeypatch)
    given = Operands(student, teacher, labels, 2.0, 9.0, 1.0)
    loss, grad = kernels.standardised_kd_loss_with_grad(given, 1.0, None)
    assert loss.isfinite() and grad.isfinite().all()


@pytest.mark.parametrize("label", [-1, 33, 2**40])
def test_a_label_out_of_range_is_nan(device, label):
    student, teacher, labels = operands(device)
    labels[1] = label
    loss, grad = kernels.standardised_kd_loss_with_grad(Operands(student, teacher, labels, 2.0, 9.0, 1.0), 1.0, None)
    assert loss.isnan() and grad[1].isnan().all() and grad[[0, 2, 3, 4]].isfinite().all()


def test_launches(device, launches):
    kernels.standardised_kd_loss_with_grad(Operands(*operands(device, 128, 10), 2.0, 9.0, 1.0), 1.0, None)
    assert [one.kernel for one in launches] == ["standardised_rows", "sum_partials"]


@pytest.mark.parametrize(
    "dtype, rows, classes", [(torch.float64, 3, 5), (torch.float32, 0, 5), (torch.float32, 2, 4100)]
)
def test_what_is_left_to_the_reference(device, launches, dtype, rows, classes):
    """Double precision, empty batches, and rows that do not fit into registers."""
    drawn = (x[:rows] for x in operands(device, 3, classes, (dtype, dtype)))
    given = Operands(*drawn, 2.0, 9.0, 1.0)
    got = kernels.standardised_kd_loss_with_grad(given, 2.0, None)
    expected = reference.standardised_kd_loss_with_grad(given, 2.0, None)
    torch.testing.assert_close(got, expected, equal_nan=True)
    torch.testing.assert_close(kernels.standardised_kd_loss(given) * 2, expected[0], equal_nan=True)
    assert not launches


def test_the_host_never_waits(monkeypatch):
    # Meta tensors have no values, so anything that reads one back to the host raises.
    monkeypatch.setattr(kernels, "launch", lambda *_: None)
    monkeypatch.setattr(_triton_finish, "launch", lambda *_: None)
    student, teacher = (torch.empty(5, 33, device="meta") for _ in range(2))
    labels = torch.empty(5, dtype=torch.int64, device="meta")
    upstream = torch.tensor(-3.0, dtype=torch.float64, device="meta")
    given = Operands(student, teacher, labels, 2.0, 9.0, 1.0)
    for wide in (False, True):
        if wide:
            monkeypatch.setattr(kernels, "WIDEST", 0)
        loss, grad = kernels.standardised_kd_loss_with_grad(given, 2.0, upstream)
        assert loss.shape == () and grad.shape == student.shape


def test_variants_are_listed_once():
    listed = [entry.variant for entry in kernels.specialisations()]
    assert len(listed) == len(set(listed))
