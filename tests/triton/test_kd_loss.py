"""The Triton kernels of kd_loss against the reference in float64, and as exact as plain PyTorch."""

from itertools import product

import pytest
import torch
from torch.nn import functional as F

from stablekd_fast.kernels import _triton_finish
from stablekd_fast.kernels.kd_loss import reference
from stablekd_fast.kernels.kd_loss import triton_impl as kernels
from stablekd_fast.kernels.kd_loss.reference import Operands
from tests.kernels.precision import assert_as_exact_as_pytorch, poisoned

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
WIDE = 8200

# NumPy, which interprets the kernels, remarks on lanes whose values are never used.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow) encountered:RuntimeWarning")


def operands(device, n=5, c=33, dtypes=(torch.float32, torch.float32), seed=0, size=3.0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (size * torch.randn(n, c, generator=generator) for _ in range(2))
    labels = torch.randint(c, (n,), generator=generator)
    weight = torch.rand(n, generator=generator)
    return student.to(device, dtypes[0]), teacher.to(device, dtypes[1]), labels.to(device), weight.to(device)


def top_k(teacher, k, temperature):
    probabilities, indices = torch.softmax(teacher.double() / temperature, 1).topk(k)
    return probabilities.to(teacher.dtype), indices


def check(student, teacher, indices, labels, weight, temperature=4.0, alpha=0.7, smoothing=0.1, upstream=None):
    """Loss and gradient against the reference on the same operands in float64."""
    settings = (indices, labels, temperature, alpha, smoothing, weight)
    wide = student.double(), teacher.double()
    expected_loss, expected_grad = reference.kd_loss_with_grad(Operands(*wide, *settings), 2.0, upstream)
    loss, grad = kernels.kd_loss_with_grad(Operands(student, teacher, *settings), 2.0, upstream)
    assert loss.dtype == torch.float32 and loss.shape == () and grad.dtype == student.dtype
    assert grad.stride() == torch.empty_like(student).stride()

    epsilon, scale = torch.finfo(torch.float32).eps, 2 * abs(1.0 if upstream is None else upstream.item())
    logits = torch.cat([x[x.isfinite()].abs() for x in (student, teacher)]).max().item()
    inexact = 8 * scale * epsilon * (1 + logits / temperature)
    torch.testing.assert_close(
        loss.double(), expected_loss.double(), rtol=8 * epsilon, atol=inexact * max(1, temperature**2)
    )
    finfo = torch.finfo(student.dtype)
    atol = inexact * max(1, temperature) / len(student) + finfo.smallest_normal
    torch.testing.assert_close(grad.double(), expected_grad, rtol=finfo.eps, atol=atol)

    alone = kernels.kd_loss(Operands(student, teacher, *settings))
    of_both, _ = kernels.kd_loss_with_grad(Operands(student, teacher, *settings), 1.0, None)
    assert torch.equal(alone, of_both)


@pytest.mark.parametrize("dtypes", list(product(FLOATS, FLOATS)), ids=str)
def test_agrees_with_float64(device, dtypes):
    check_both_teachers(device, dtypes, True, True)


@pytest.mark.parametrize("with_labels, with_weight", [(False, False), (True, False), (False, True)])
def test_labels_and_weights_are_optional(device, with_labels, with_weight):
    check_both_teachers(device, (torch.bfloat16, torch.float32), with_labels, with_weight)


def check_both_teachers(device, dtypes, with_labels, with_weight):
    student, teacher, labels, weight = operands(device, 5, 33, dtypes)
    upstream = torch.tensor(-3.0, device=device, dtype=torch.float64 if with_weight else torch.float32)
    labels, weight = labels if with_labels else None, weight if with_weight else None
    check(student, teacher, None, labels, weight, upstream=upstream)
    probabilities, indices = top_k(teacher, 3, 4.0)
    check(student, probabilities, indices, labels, weight, upstream=upstream)


@pytest.mark.parametrize("classes", [1, 2, 10, 16, 17, 100, 136, 1000, 1030, 4100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_classes(device, classes, dtype):
    student, teacher, labels, weight = operands(device, 3, classes, (dtype, dtype))
    check(student, teacher, None, labels, weight)
    probabilities, indices = top_k(teacher, min(2, classes), 4.0)
    check(student, probabilities, indices, labels, weight)


@pytest.mark.parametrize("temperature, smoothing", [(0.5, 0.0), (1.0, 0.3), (20.0, 0.0)])
def test_temperatures_and_smoothing(device, temperature, smoothing):
    student, teacher, labels, _ = operands(device)
    check(student, teacher, None, labels, None, temperature, smoothing=smoothing)
    probabilities, indices = top_k(teacher, 3, temperature)
    check(student, probabilities, indices, labels, None, temperature, smoothing=smoothing)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_as_exact_as_pytorch(device, dtype, temperature):
    labels = operands(device, 16, 100)[2]

    def plain(student, teacher):
        kl = F.kl_div(
            F.log_softmax(student / temperature, 1), F.softmax(teacher / temperature, 1), reduction="batchmean"
        )
        return 0.5 * temperature**2 * kl + 0.5 * F.cross_entropy(student, labels)

    def fused(student, teacher):
        return kernels.kd_loss_with_grad(
            Operands(student, teacher, None, labels, temperature, 0.5, 0.0, None), 1.0, None
        )

    assert_as_exact_as_pytorch(fused, plain, [operands(device, 16, 100, (dtype, dtype), seed)[:2] for seed in range(6)])


def test_wide_rows(device):
    student, teacher, labels, weight = operands(device, 2, WIDE)
    # Maxima that rise from chunk to chunk, and chunks of excluded classes alone, in both and in the teacher.
    student[0] += torch.linspace(0, 30, WIDE, device=device)
    teacher[0] += torch.linspace(0, 50, WIDE, device=device)
    student[1, :5000], teacher[1, :5000], teacher[1, 5000:5100] = -torch.inf, -torch.inf, -torch.inf
    labels[1] = 6000
    upstream = torch.tensor(-3.0, device=device)
    check(student, teacher, None, labels, weight, upstream=upstream)
    check(student, teacher, None, None, None)
    probabilities, indices = top_k(teacher, 3, 4.0)
    check(student, probabilities, indices, labels, weight, upstream=upstream)
    check(student, probabilities, indices, None, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wide_rows_of_half_floats(device, dtype):
    student, teacher, labels, weight = operands(device, 2, WIDE + 1, (dtype, dtype))
    check(student, teacher, None, labels, weight)


@pytest.mark.parametrize("classes", [12, WIDE])
def test_masked_classes(device, classes):
    student, teacher, labels, _ = operands(device, 4, classes)
    labels[:] = 5
    student[:, 1], teacher[:, 1] = -torch.inf, -torch.inf
    teacher[1, 2] = -torch.inf
    student[3, 6:], teacher[3, 6:] = -torch.inf, -torch.inf
    check(student, teacher, None, labels, None)
    probabilities, indices = top_k(teacher, 4, 4.0)
    check(student, probabilities, indices, labels, None)
    # A class that only the student excludes.
    student[2, indices[2, 0]] = -torch.inf
    for given in ((teacher, None), (probabilities, indices)):
        for smoothing in (0.0, 0.1):
            settings = (given[1], labels, 4.0, 0.9, smoothing, None)
            loss, grad = kernels.kd_loss_with_grad(Operands(student, given[0], *settings), 1.0, None)
            _, expected = reference.kd_loss_with_grad(
                Operands(student.double(), given[0].double(), *settings), 1.0, None
            )
            assert loss == torch.inf
            torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("classes", [12, WIDE])
@pytest.mark.parametrize("share", [0.6, 1.3])
def test_kept_probabilities_need_not_sum_to_one(device, classes, share):
    student, teacher, labels, _ = operands(device, 2, classes)
    student[:, 5:] = -torch.inf
    labels[:] = 2
    probabilities, indices = top_k(teacher[:, :5], 5, 4.0)
    check(student, share * probabilities, indices, labels, None)


@pytest.mark.parametrize("temperature", [0.5, 4.0])
@pytest.mark.parametrize("classes", [33, WIDE])
def test_extreme_logits(device, temperature, classes):
    student, teacher, labels, _ = operands(device, 4, classes, size=1.0)
    student[0, 0], student[1, 2], teacher[2, 3], teacher[3, 4] = 1e4, -1e4, 1e4, -1e4
    check(student, teacher, None, labels, None, temperature)
    check(student + 1e4, teacher - 1e4, None, labels, None, temperature)


@pytest.mark.parametrize("classes", [12, WIDE])
@pytest.mark.parametrize("bad", [-1, "classes", 2**32 + 3])
def test_what_is_no_class_gives_nan_in_its_row(device, classes, bad):
    bad = classes if bad == "classes" else bad
    student, teacher, labels, _ = operands(device, 3, classes)
    probabilities, indices = top_k(teacher, 2, 4.0)
    wrong_labels, wrong_indices = labels.clone(), indices.clone()
    wrong_labels[1], wrong_indices[1, 1] = bad, bad
    for given in ((teacher, None, wrong_labels), (probabilities, wrong_indices, labels)):
        loss, grad = kernels.kd_loss_with_grad(Operands(student, *given, 4.0, 0.9, 0.1, None), 1.0, None)
        assert loss.isnan() and grad[1].isnan().all() and grad[[0, 2]].isfinite().all()


def test_operands_need_not_be_contiguous(device):
    student, teacher, labels, weight = operands(device, 8, 36)
    strided = (student[::2, ::3], teacher[::2, ::3], None, labels[::2] % 12, weight[::2])
    check(*strided)
    check(student.t().contiguous().t(), teacher[:, :], None, labels, weight)
    # Rows far apart, memory that begins at an odd place, expanded rows.
    check(student[:, 1:20], teacher[:, 2:21], None, labels % 19, weight)
    check(student[1:, :], teacher[:1].expand(7, -1), None, labels[1:], weight[1:])
    probabilities, indices = top_k(teacher, 6, 4.0)
    check(student, probabilities[:, ::2], indices[:, ::2], labels, weight)


def test_many_rows(device):
    student, teacher, labels, weight = operands(device, 1100, 16)
    check(student, teacher, None, labels, weight)


@pytest.mark.parametrize("classes", [7, 33, WIDE])
def test_every_element_is_written(device, classes, monkeypatch):
    student, teacher, labels, weight = operands(device, 3, classes)
    probabilities, indices = top_k(teacher, 1, 4.0)
    poisoned(monkeypatch)
    for given in ((teacher, None), (probabilities, indices)):
        loss, grad = kernels.kd_loss_with_grad(Operands(student, *given, labels, 4.0, 0.9, 0.1, weight), 1.0, None)
        assert loss.isfinite() and grad.isfinite().all()


def test_double_precision_and_empty_batches_are_left_to_the_reference(device, launches):
    student, teacher, labels, weight = operands(device, 3, 5, (torch.float64, torch.float32))
    settings = (None, labels, 4.0, 0.9, 0.1, weight)
    got = kernels.kd_loss_with_grad(Operands(student, teacher, *settings), 2.0, None)
    torch.testing.assert_close(got, reference.kd_loss_with_grad(Operands(student, teacher, *settings), 2.0, None))
    assert kernels.kd_loss(
        Operands(student.float()[:0], teacher[:0], None, labels[:0], *settings[2:5], weight[:0])
    ).isnan()
    assert not launches


def test_the_host_never_waits(monkeypatch):
    # Meta tensors have no values, so anything that reads one back to the host raises.
    monkeypatch.setattr(kernels, "launch", lambda *_: None)
    monkeypatch.setattr(_triton_finish, "launch", lambda *_: None)
    student, teacher, labels, weight = operands("meta")
    upstream = torch.tensor(-3.0, dtype=torch.float64, device="meta")
    loss, grad = kernels.kd_loss_with_grad(
        Operands(student, teacher, None, labels, 4.0, 0.9, 0.1, weight), 2.0, upstream
    )
    assert loss.shape == () and grad.shape == student.shape


def test_variants_are_listed_once():
    listed = [entry.variant for entry in kernels.specialisations()]
    assert len(listed) == len(set(listed))
