"""grouped_kl against the two divergences of its definition, in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stablekd_fast.kernels import grouped_kl, grouped_kl_with_grad, kd_loss
from stablekd_fast.kernels.grouped_kl import reference
from stablekd_fast.kernels.grouped_kl.reference import Operands
from tests.kernels.precision import assert_as_exact_as_pytorch, poisoned


def primary(teacher, temperature, threshold):
    """The primary groups, row by row in float64: classes are taken until they reach the threshold."""
    p = torch.softmax(teacher.double() / temperature, 1)
    groups = torch.zeros_like(p, dtype=torch.bool)
    for row, logits, group in zip(p.tolist(), teacher.tolist(), groups):
        mass = 0.0
        for place in sorted(range(len(row)), key=lambda i: -logits[i]):  # stable: of equal ones the first
            if mass >= threshold:
                break
            mass += row[place]
            group[place] = True
    return groups


def plain_loss(student, teacher, groups, temperature=4.0, primary_weight=1.0, binary_weight=1.0):
    """Masses by adding up probabilities, and the distribution inside the group by dividing by them."""
    q, p = (torch.softmax(x / temperature, 1) for x in (student, teacher))
    big_q, big_p = ((x * groups).sum(1) for x in (q, p))
    small_q, small_p = ((x * ~groups).sum(1) for x in (q, p))
    binary = big_p * (big_p / big_q).log()
    rest = (small_p > 0) & (small_q > 0)
    binary = binary + small_p * torch.where(rest, small_p / torch.where(rest, small_q, 1.0), 1.0).log()
    inner = (p / big_p[:, None]).log() - (q / big_q[:, None]).log()
    inner = torch.where(groups, p * torch.where(groups, inner, 0.0), 0.0).sum(1)
    return temperature**2 * (binary_weight * binary + primary_weight * inner).mean()


def operands(n=6, c=11, dtype=torch.float32, seed=0, size=3.0, temperature=4.0, threshold=0.9):
    """Draw logits whose primary groups do not hang on roundings of the last class that is taken."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (size * torch.randn(4 * n, c, generator=generator) for _ in range(2))
    student, teacher = student.to(dtype), teacher.to(dtype)
    ordered = torch.softmax(teacher.double() / temperature, 1).sort(1, descending=True).values.cumsum(1)
    clear = (ordered - threshold).abs().amin(1) > 2e-6
    assert clear.sum() >= n
    return student[clear][:n], teacher[clear][:n]


@given(
    n=st.integers(1, 9),
    c=st.integers(1, 130),
    temperature=st.sampled_from([0.5, 1.0, 4.0, 20.0]),
    threshold=st.sampled_from([0.2, 0.5, 0.9, 0.99]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_agrees_with_float64(n, c, temperature, threshold, dtype):
    student, teacher = operands(n, c, dtype, seed=n * c, temperature=temperature, threshold=threshold)
    weights = dict(primary_weight=0.7, binary_weight=3.0)
    exact = student.double().requires_grad_()
    groups = primary(teacher, temperature, threshold)
    expected = 2.5 * plain_loss(exact, teacher.double(), groups, temperature, **weights)
    (expected_grad,) = torch.autograd.grad(expected, exact)
    loss, grad = grouped_kl_with_grad(
        student, teacher, temperature=temperature, threshold=threshold, scale=2.5, **weights
    )
    epsilon = torch.finfo(torch.float32).eps
    inexact = 64 * epsilon * (1 + 12 / temperature)
    torch.testing.assert_close(
        loss.double(), expected.detach(), rtol=8 * epsilon, atol=inexact * max(1, temperature**2)
    )
    atol = inexact * max(1, temperature) / n + torch.finfo(dtype).smallest_normal
    torch.testing.assert_close(grad.double(), expected_grad, rtol=torch.finfo(dtype).eps, atol=atol)


@pytest.mark.parametrize("temperature, dtype", [(1.0, torch.float32), (4.0, torch.bfloat16), (4.0, torch.float16)])
def test_the_reference_agrees_with_float64(temperature, dtype):
    student, teacher = operands(9, 40, dtype, temperature=temperature)
    exact = student.double().requires_grad_()
    expected = plain_loss(exact, teacher.double(), primary(teacher, temperature, 0.9), temperature, 0.7, 3.0)
    (expected_grad,) = torch.autograd.grad(expected, exact)
    given_ = Operands(student, teacher, temperature, 0.9, 0.7, 3.0)
    loss, grad = reference.grouped_kl_with_grad(given_, 1.0, None)
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize(
    "temperature, dtype",
    [
        (1.0, torch.float32),
        (4.0, torch.float32),
        (4.0, torch.bfloat16),
        (4.0, torch.float16),
        (20.0, torch.float32),
        (20.0, torch.float16),
    ],
)
def test_as_exact_as_pytorch(dtype, temperature):
    def plain(student, teacher):
        groups = primary(teacher, temperature, 0.9)
        return plain_loss(student, teacher, groups, temperature)

    def fused(student, teacher):
        return grouped_kl_with_grad(student, teacher, temperature=temperature)

    draws = [operands(64, 257, dtype, seed, temperature=temperature) for seed in range(8)]
    assert_as_exact_as_pytorch(fused, plain, draws)


def taken(student, teacher, **settings):
    """The primary group as the gradient shows it: where the binary term has no weight, others have none."""
    gradient = grouped_kl_with_grad(student, teacher, binary_weight=0.0, **settings)[1]
    return gradient != 0


@pytest.mark.parametrize("classes", [2, 3, 20, 50, 300])
@pytest.mark.parametrize("distinct", [1, 2, 7])
@pytest.mark.parametrize("threshold", [0.317, 0.723, 0.937])
def test_of_equal_classes_the_first_are_taken(classes, distinct, threshold):
    generator = torch.Generator().manual_seed(classes)
    teacher = torch.randint(distinct, (9, classes), generator=generator).float() / 4 - 1
    teacher[::2] *= -1  # zeros of both signs are equal
    teacher[teacher == 0] *= -1
    student = torch.randn(9, classes, generator=generator)
    p = torch.softmax(teacher.double() / 4, 1).sort(1, descending=True).values.cumsum(1)
    clear = (p - threshold).abs().amin(1) > 1e-6
    assert clear.any()
    groups = primary(teacher, 4.0, threshold)
    alone = groups.sum(1) == 1  # of one class alone the distribution is certain, and the gradient 0
    assert torch.equal(taken(student, teacher, threshold=threshold)[clear & ~alone], groups[clear & ~alone])
    by_reference = reference._primary(teacher, 4.0, threshold)
    assert torch.equal(by_reference[clear], groups[clear])


@pytest.mark.parametrize("size", [1e4, -1e4])
@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_extreme_logits(size, temperature):
    student, teacher = operands()
    student[0, 0], teacher[1, 1], student[2, 0], teacher[3, 0] = size, size, size, size
    teacher[4, 3] = student[4, 3] = size
    loss, grad = grouped_kl_with_grad(student, teacher, temperature=temperature)
    exact = student.double().requires_grad_()
    expected = reference.grouped_kl(Operands(exact, teacher.double(), temperature, 0.9, 1.0, 1.0))
    (expected_grad,) = torch.autograd.grad(expected, exact)
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-4, atol=1e-5)


def test_masked_classes_are_as_if_absent():
    student, teacher = operands()
    keep = torch.tensor([0, 2, 3, 5, 6, 7, 10])
    masked_student, masked_teacher = (torch.full_like(x, -torch.inf) for x in (student, teacher))
    masked_student[:, keep], masked_teacher[:, keep] = student[:, keep], teacher[:, keep]
    loss, grad = grouped_kl_with_grad(masked_student, masked_teacher)
    short_loss, short_grad = grouped_kl_with_grad(student[:, keep], teacher[:, keep])
    torch.testing.assert_close(loss, short_loss)
    torch.testing.assert_close(grad[:, keep], short_grad)
    assert not grad.isnan().any() and grad.count_nonzero() == grad[:, keep].count_nonzero()


@pytest.mark.parametrize("function", [grouped_kl_with_grad, None])
def test_classes_that_one_of_them_excludes(function):
    def by_reference(student, teacher):
        return reference.grouped_kl_with_grad(Operands(student, teacher, 4.0, 0.9, 1.0, 1.0), 1.0, None)

    function = function or by_reference
    student, teacher = operands(c=30)
    teacher[:, 2] = -torch.inf
    loss, grad = function(student, teacher)
    exact = function(student.double(), teacher.double())
    torch.testing.assert_close((loss.double(), grad.double()), exact, rtol=1e-4, atol=1e-5)
    assert (grad[:, 2] > 0).all()  # the student's share there is to fall
    teacher[0, 5], student[0, 5] = 200.0, -torch.inf  # the whole group
    student[1, teacher[1].argmax()] = -torch.inf  # one class of it
    loss, grad = function(student, teacher)
    assert loss == torch.inf and grad.isfinite().all()


def test_first_and_second_derivatives():
    student, teacher = operands(3, 5, torch.float64)
    inputs = (student.requires_grad_(), teacher.requires_grad_())
    assert torch.autograd.gradcheck(grouped_kl, inputs)
    assert torch.autograd.gradgradcheck(grouped_kl, inputs)
    assert torch.autograd.gradgradcheck(lambda student: grouped_kl(student, inputs[1]).square(), inputs[:1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_backward_honours_the_upstream_gradient(dtype):
    student, teacher = operands(dtype=dtype)
    student.requires_grad_()
    (-3 * grouped_kl(student, teacher)).backward()
    for options in (dict(scale=-3.0), dict(scale=1.5, upstream=torch.tensor(-2.0))):
        torch.testing.assert_close(student.grad, grouped_kl_with_grad(student, teacher, **options)[1])


@pytest.mark.parametrize("classes", [1, 2, 7, 8, 33, 1030])
def test_every_element_is_written(classes, monkeypatch):
    student, teacher = operands(5, classes)
    poisoned(monkeypatch)
    loss, grad = grouped_kl_with_grad(student, teacher)
    assert loss.isfinite() and grad.isfinite().all()


def test_operands_need_not_be_contiguous():
    student, teacher = operands(8, 12)
    strided = grouped_kl_with_grad(student[::2, ::3], teacher[::2, ::3])
    dense = grouped_kl_with_grad(student[::2, ::3].contiguous(), teacher[::2, ::3].contiguous())
    assert torch.equal(strided[0], dense[0]) and torch.equal(strided[1], dense[1])


def test_never_waits_for_the_device():
    # Meta tensors have no values, so anything that reads one back to the host raises.
    student, teacher = (x.to("meta") for x in operands())
    loss, grad = reference.grouped_kl_with_grad(Operands(student, teacher, 4.0, 0.9, 1.0, 1.0), 1.0, None)
    assert loss.shape == () and grad.shape == student.shape


def test_opcheck():
    student, teacher = operands(3, 4)
    student.requires_grad_()
    settings = (4.0, 0.9, 1.0, 2.0)
    torch.library.opcheck(torch.ops.stablekd.grouped_kl.default, (student, teacher, *settings))
    torch.library.opcheck(
        torch.ops.stablekd.grouped_kl_with_grad.default, (student, teacher, *settings, 2.0, torch.tensor(0.5))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [1000, 1003])
def test_gradients_too_large_for_the_caches(classes, dtype, monkeypatch):
    """They are written past the caches, by whole vectors: rows lie at every place of one."""
    few = operands(64, classes, dtype)
    student, teacher = (x.repeat(17200 // dtype.itemsize // 64, 1) for x in few)
    exact = few[0].double().requires_grad_()
    expected = plain_loss(exact, few[1].double(), primary(few[1], 4.0, 0.9))
    (gradient,) = torch.autograd.grad(expected, exact)
    poisoned(monkeypatch)
    loss, grad = grouped_kl_with_grad(student, teacher)
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=0)
    times = len(student) // 64
    gradient = gradient.repeat(times, 1) / times
    largest = gradient.abs().amax().item()
    torch.testing.assert_close(grad.double(), gradient, rtol=torch.finfo(dtype).eps, atol=4e-6 * largest)


def test_the_split_is_exact():
    student, teacher = operands(dtype=torch.float64)
    student[0, 0] = teacher[0, 0] = -torch.inf
    for threshold in (0.1, 0.5, 0.9, 0.999999):
        binary, primary, secondary, mass = reference.split(student, teacher, 4.0, threshold)
        whole = 16 * (binary + mass * primary + (1 - mass) * secondary).mean()
        torch.testing.assert_close(whole, kd_loss(student, teacher))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(teacher_logits=torch.zeros(6, 10)), r"teacher_logits is float32 \[6, 10\]"),
        (dict(temperature=0.0), "temperature=0.0"),
        (dict(threshold=1.0), "threshold=1.0"),
        (dict(threshold=0.0), "threshold=0.0"),
    ],
)
def test_unusable_operands_are_named(change, message):
    student, teacher = operands()
    arguments = dict(student_logits=student, teacher_logits=teacher) | change
    for operator in (grouped_kl, grouped_kl_with_grad):
        with pytest.raises(ValueError, match=message):
            operator(**arguments)


@pytest.mark.gpu
def test_same_on_the_gpu_without_waiting():
    student, teacher = operands(64, 100)
    expected = grouped_kl_with_grad(student, teacher)
    on_gpu = [x.cuda() for x in (student, teacher)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = grouped_kl_with_grad(*on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(tuple(x.cpu() for x in got), expected)
