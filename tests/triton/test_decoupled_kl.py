"""The Triton kernels of decoupled_kl against the reference in float64, and as exact as plain PyTorch."""

from itertools import product

import pytest
import torch
from torch.nn import functional as F

from stablekd_fast.kernels import _triton_finish
from stablekd_fast.kernels.decoupled_kl import reference
from stablekd_fast.kernels.decoupled_kl import triton_impl as kernels
from stablekd_fast.kernels.decoupled_kl.reference import Operands
from tests.kernels.precision import assert_as_exact_as_pytorch, poisoned

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
WIDE = 8200

# NumPy, which interprets the kernels, remarks on lanes whose values are never used.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow) encountered:RuntimeWarning")


def operands(device, n=5, c=33, dtypes=(torch.float32, torch.float32), seed=0, size=3.0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (size * torch.randn(n, c, generator=generator) for _ in range(2))
    labels = torch.randint(c, (n,), generator=generator)
    return student.to(device, dtypes[0]), teacher.to(device, dtypes[1]), labels.to(device)


def check(student, teacher, labels, temperature=4.0, alpha=0.7, beta=2.5, upstream=None):
    """Loss and gradient against the reference on the same operands in float64."""
    settings = (labels, temperature, alpha, beta)
    expected_loss, expected_grad = reference.decoupled_kl_with_grad(
        Operands(student.double(), teacher.double(), *settings), 2.0, upstream
    )
    loss, grad = kernels.decoupled_kl_with_grad(Operands(student, teacher, *settings), 2.0, upstream)
    assert loss.dtype == torch.float32 and loss.shape == () and grad.dtype == student.dtype
    assert grad.stride() == torch.empty_like(student).stride()

    epsilon, scale = torch.finfo(torch.float32).eps, 2 * abs(1.0 if upstream is None else upstream.item())
    logits = torch.cat([x[x.isfinite()].abs() for x in (student, teacher)]).max().item()
    inexact = 8 * scale * (alpha + beta) * epsilon * (1 + logits / temperature)
    torch.testing.assert_close(
        loss.double(), expected_loss.double(), rtol=8 * epsilon, atol=inexact * max(1, temperature**2)
    )
    finfo = torch.finfo(student.dtype)
    atol = inexact * max(1, temperature) / len(student) + finfo.smallest_normal
    torch.testing.assert_close(grad.double(), expected_grad, rtol=finfo.eps, atol=atol)

    alone = kernels.decoupled_kl(Operands(student, teacher, *settings))
    assert torch.equal(alone, kernels.decoupled_kl_with_grad(Operands(student, teacher, *settings), 1.0, None)[0])


@pytest.mark.parametrize("dtypes", list(product(FLOATS, FLOATS)), ids=str)
def test_agrees_with_float64(device, dtypes):
    student, teacher, labels = operands(device, 5, 33, dtypes)
    for dtype in (torch.float32, torch.float64):
        check(student, teacher, labels, upstream=torch.tensor(-3.0, device=device, dtype=dtype))


@pytest.mark.parametrize("classes", [2, 3, 16, 100, 136, 1000, 4100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_classes(device, classes, dtype):
    check(*operands(device, 3, classes, (dtype, dtype)))


@pytest.mark.parametrize("temperature, alpha, beta", [(0.5, 1.0, 0.0), (1.0, 0.0, 1.0), (20.0, 1.0, 8.0)])
def test_temperatures_and_shares(device, temperature, alpha, beta):
    check(*operands(device), temperature, alpha, beta)


def plain_loss(student, teacher, labels, temperature, alpha, beta):
    """Both divergences by log_softmax over what they compare."""
    own = F.one_hot(labels, student.shape[1]).bool()

    def parts(logits):
        logits = logits / temperature
        rest = logits[~own].view(len(logits), -1)
        return F.log_softmax(torch.stack([logits[own], rest.logsumexp(1)], 1), 1), F.log_softmax(rest, 1)

    (q, q_rest), (p, p_rest) = parts(student), parts(teacher)
    tckd, nckd = (F.kl_div(x, y, reduction="batchmean", log_target=True) for x, y in ((q, p), (q_rest, p_rest)))
    return temperature**2 * (alpha * tckd + beta * nckd)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_as_exact_as_pytorch(device, dtype, temperature):
    settings = (operands(device, 16, 100)[2], temperature, 1.0, 2.0)

    def plain(student, teacher):
        return plain_loss(student, teacher, *settings)

    def fused(student, teacher):
        return kernels.decoupled_kl_with_grad(Operands(student, teacher, *settings), 1.0, None)

    assert_as_exact_as_pytorch(fused, plain, [operands(device, 16, 100, (dtype, dtype), seed)[:2] for seed in range(6)])


@pytest.mark.parametrize("dtype", FLOATS)
def test_wide_rows(device, dtype):
    student, teacher, labels = operands(device, 2, WIDE, (dtype, dtype))
    # Maxima that rise from chunk to chunk, and chunks of excluded classes alone, in both and in the teacher.
    student[0] += torch.linspace(0, 30, WIDE, device=device).to(dtype)
    teacher[0] += torch.linspace(0, 50, WIDE, device=device).to(dtype)
    student[1, :5000], teacher[1, :5000], teacher[1, 5000:5100] = -torch.inf, -torch.inf, -torch.inf
    labels[1] = 6000
    check(student, teacher, labels, upstream=torch.tensor(-3.0, device=device))


@pytest.mark.parametrize("classes", [12, WIDE])
def test_masked_classes(device, classes):
    student, teacher, labels = operands(device, 4, classes)
    labels[:] = 5
    student[:, 1], teacher[:, 1] = -torch.inf, -torch.inf
    teacher[1, 2] = -torch.inf
    student[3, 6:], teacher[3, 6:] = -torch.inf, -torch.inf
    check(student, teacher, labels)
    # A class that only the student excludes.
    student[2, 4] = -torch.inf
    loss, grad = kernels.decoupled_kl_with_grad(Operands(student, teacher, labels, 4.0, 1.0, 8.0), 1.0, None)
    assert loss == torch.inf and grad.isfinite().all()


@pytest.mark.parametrize("temperature", [0.5, 4.0])
@pytest.mark.parametrize("classes", [33, WIDE])
def test_extreme_logits(device, temperature, classes):
    student, teacher, labels = operands(device, 6, classes, size=1.0)
    labels[:] = 2
    student[0, 0], student[1, 2], teacher[2, 3], teacher[3, 4] = 1e4, -1e4, 1e4, -1e4
    student[4, 2], teacher[5, 2] = 1e4, 1e4
    check(student, teacher, labels, temperature)
    check(student + 1e4, teacher - 1e4, labels, temperature)


@pytest.mark.parametrize("classes", [12, WIDE])
@pytest.mark.parametrize("bad", [-1, "classes", 2**32 + 3])
def test_labels_that_are_no_class_give_nan_in_their_row(device, classes, bad):
    student, teacher, labels = operands(device, 3, classes)
    labels[1] = classes if bad == "classes" else bad
    loss, grad = kernels.decoupled_kl_with_grad(Operands(student, teacher, labels, 4.0, 1.0, 8.0), 1.0, None)
    assert loss.isnan() and grad[1].isnan().all() and grad[[0, 2]].isfinite().all()


def test_operands_need_not_be_contiguous(device):
    student, teacher, labels = operands(device, 8, 36)
    check(student[::2, ::3], teacher[::2, ::3], labels[::2] % 12)
    check(student.t().contiguous().t(), teacher, labels)
    check(student[:, 1:20], teacher[:, 2:21], labels % 19)
    check(student[1:], teacher[:1].expand(7, -1), labels[1:])


def test_many_rows(device):
    check(*operands(device, 130, 7))


@pytest.mark.parametrize("classes", [7, 33, WIDE])
def test_every_element_is_written(device, classes, monkeypatch):
    student, teacher, labels = operands(device, 3, classes)
    poisoned(monkeypatch)
    loss, grad = kernels.decoupled_kl_with_grad(Operands(student, teacher, labels, 4.0, 1.0, 8.0), 1.0, None)
    assert loss.isfinite() and grad.isfinite().all()


def test_double_precision_and_empty_batches_are_left_to_the_reference(device, launches):
    student, teacher, labels = operands(device, 3, 5, (torch.float64, torch.float32))
    got = kernels.decoupled_kl_with_grad(Operands(student, teacher, labels, 4.0, 1.0, 8.0), 2.0, None)
    expected = reference.decoupled_kl_with_grad(Operands(student, teacher, labels, 4.0, 1.0, 8.0), 2.0, None)
    torch.testing.assert_close(got, expected)
    assert kernels.decoupled_kl(Operands(student.float()[:0], teacher[:0], labels[:0], 4.0, 1.0, 8.0)).isnan()
    assert not launches


def test_the_host_never_waits(monkeypatch):
    # Meta tensors have no values, so anything that reads one back to the host raises.
    monkeypatch.setattr(kernels, "launch", lambda *_: None)
    monkeypatch.setattr(_triton_finish, "launch", lambda *_: None)
    student, teacher, labels = operands("meta")
    upstream = torch.tensor(-3.0, dtype=torch.float64, device="meta")
    loss, grad = kernels.decoupled_kl_with_grad(Operands(student, teacher, labels, 4.0, 1.0, 8.0), 2.0, upstream)
    assert loss.shape == () and grad.shape == student.shape


def test_variants_are_listed_once():
    listed = [entry.variant for entry in kernels.specialisations()]
    assert len(listed) == len(set(listed))
