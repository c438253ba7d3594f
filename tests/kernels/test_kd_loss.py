"""kd_loss against torch.nn.functional in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from stablekd_fast.kernels import kd_loss, kd_loss_with_grad
from stablekd_fast.kernels.kd_loss import reference
from stablekd_fast.kernels.kd_loss.reference import Operands
from tests.kernels.precision import assert_as_exact_as_pytorch, poisoned

SETTINGS = dict(temperature=3.0, alpha=0.7, label_smoothing=0.1)


def expected_loss(student, teacher, labels=None, temperature=4.0, alpha=0.9, label_smoothing=0.0, weight=None):
    student, teacher = student.double(), teacher.double()
    kl = F.kl_div(F.log_softmax(student / temperature, 1), F.softmax(teacher / temperature, 1), reduction="none")
    samples = temperature**2 * kl.sum(1)
    if labels is not None:
        cross_entropy = F.cross_entropy(student, labels, reduction="none", label_smoothing=label_smoothing)
        samples = alpha * samples + (1 - alpha) * cross_entropy
    return (samples if weight is None else samples * weight.double()).mean()


def operands(n=6, c=11, dtype=torch.float32, seed=0, size=3.0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (size * torch.randn(n, c, generator=generator) for _ in range(2))
    labels = torch.randint(c, (n,), generator=generator)
    return student.to(dtype), teacher.to(dtype), labels, torch.rand(n, generator=generator)


def check_against_float64(student, teacher, labels, **settings):
    """Loss and gradient within what float32 arithmetic and one rounding to the student's dtype can lose."""
    temperature, scale = settings["temperature"], settings.pop("scale", 1.0)
    exact = student.double().requires_grad_()
    expected = scale * expected_loss(exact, teacher, labels, **settings)
    (expected_grad,) = torch.autograd.grad(expected, exact)

    loss, grad = kd_loss_with_grad(student, teacher, labels, scale=scale, **settings)
    assert loss.dtype == torch.float32 and grad.dtype == student.dtype and not loss.requires_grad

    epsilon = torch.finfo(torch.float32).eps
    # log softmax is as inexact as the largest logit; the KL term multiplies that by T^2, its gradient by T.
    logits = max(student.abs().max().item(), teacher.abs().max().item())
    inexact = 8 * scale * epsilon * (1 + logits / temperature)
    atol = inexact * max(1, temperature**2)
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=8 * epsilon, atol=atol)
    rounding = torch.finfo(student.dtype).eps
    atol = inexact * max(1, temperature) / len(student) + torch.finfo(student.dtype).smallest_normal
    torch.testing.assert_close(grad.double(), expected_grad, rtol=rounding, atol=atol)


@given(
    n=st.integers(1, 9),
    c=st.integers(1, 130),
    temperature=st.sampled_from([0.5, 1.0, 4.0, 20.0]),
    with_labels=st.booleans(),
    with_weight=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_agrees_with_float64(n, c, temperature, with_labels, with_weight, dtype):
    student, teacher, labels, weight = operands(n, c, dtype, seed=n * c)
    check_against_float64(
        student,
        teacher,
        labels if with_labels else None,
        temperature=temperature,
        alpha=0.7,
        label_smoothing=0.1,
        weight=weight if with_weight else None,
        scale=2.5,
    )


def top_k(teacher, k, temperature):
    probabilities, indices = torch.softmax(teacher.double() / temperature, 1).topk(k)
    return probabilities.to(teacher.dtype), indices


def spread(indices, probabilities, classes):
    """The whole distribution: what the kept probabilities lack to 1, evenly over the other classes."""
    rest = (1 - probabilities.double().sum(1, keepdim=True)).clamp_min(0) / max(classes - indices.shape[1], 1)
    return rest.expand(-1, classes).scatter(1, indices, probabilities.double())


@given(
    n=st.integers(1, 5),
    c=st.integers(2, 70),
    k=st.integers(1, 4),
    temperature=st.sampled_from([0.5, 1.0, 4.0]),
    with_labels=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_a_teacher_may_give_its_largest_probabilities(n, c, k, temperature, with_labels, dtype):
    student, teacher, labels, weight = operands(n, c, dtype, seed=c)
    labels = labels if with_labels else None
    probabilities, indices = top_k(teacher, min(k, c), temperature)
    settings = dict(temperature=temperature, weight=weight, label_smoothing=0.1)
    loss, grad = kd_loss_with_grad(student, (indices, probabilities), labels, **settings)

    whole = spread(indices, probabilities, c)
    exact = student.double().requires_grad_()
    log_q = F.log_softmax(exact / temperature, 1)
    samples = temperature**2 * (torch.xlogy(whole, whole) - whole * log_q).sum(1)
    if labels is not None:
        hard = F.cross_entropy(exact, labels, reduction="none", label_smoothing=0.1)
        samples = 0.9 * samples + 0.1 * hard
    expected = (samples * weight.double()).mean()
    (expected_grad,) = torch.autograd.grad(expected, exact)
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    rtol = torch.finfo(dtype).eps
    torch.testing.assert_close(grad.double(), expected_grad, rtol=rtol, atol=max(rtol * 1e-2, 1e-6))


def test_all_probabilities_are_the_whole_teacher():
    student, teacher, labels, _ = operands(dtype=torch.float64)
    probabilities, indices = top_k(teacher, teacher.shape[1], 4.0)
    for got, expected in zip(
        kd_loss_with_grad(student, (indices, probabilities), labels), kd_loss_with_grad(student, teacher, labels)
    ):
        torch.testing.assert_close(got, expected)


def test_what_a_teacher_did_not_keep_avoids_masked_classes():
    student, teacher, _, _ = operands(4, 8)
    keep = torch.tensor([0, 1, 2, 4, 6, 7])
    masked = torch.full_like(student, -torch.inf)
    masked[:, keep] = student[:, keep]
    probabilities, indices = top_k(teacher[:, keep], 2, 4.0)
    loss, grad = kd_loss_with_grad(masked, (keep[indices], probabilities))
    short_loss, short_grad = kd_loss_with_grad(student[:, keep], (indices, probabilities))
    torch.testing.assert_close(loss, short_loss)
    torch.testing.assert_close(grad[:, keep], short_grad)
    assert not grad[:, [3, 5]].any()


def test_derivatives_through_a_teacher_s_largest_probabilities():
    student, teacher, labels, _ = operands(3, 6, torch.float64)
    probabilities, indices = top_k(teacher, 2, 4.0)
    inputs = (student.requires_grad_(), probabilities.requires_grad_())

    def loss(student, probabilities):
        return kd_loss(student, (indices, probabilities), labels)

    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0, 8.0, 20.0])
def test_as_exact_as_pytorch(dtype, temperature):
    labels = operands(64, 257)[2]

    def plain(student, teacher):
        kl = F.kl_div(
            F.log_softmax(student / temperature, 1), F.softmax(teacher / temperature, 1), reduction="batchmean"
        )
        return 0.5 * temperature**2 * kl + 0.5 * F.cross_entropy(student, labels)

    def fused(student, teacher):
        return kd_loss_with_grad(student, teacher, labels, temperature=temperature, alpha=0.5)

    assert_as_exact_as_pytorch(fused, plain, [operands(64, 257, dtype, seed)[:2] for seed in range(6)])


@pytest.mark.parametrize("classes", [1, 7, 8, 33, 1030])
def test_every_element_is_written(classes, monkeypatch):
    student, teacher, labels, weight = operands(5, classes)
    poisoned(monkeypatch)
    for other in (teacher, top_k(teacher, 1, 4.0)[::-1]):
        loss, grad = kd_loss_with_grad(student, other, labels, weight=weight)
        assert loss.isfinite() and grad.isfinite().all()


def test_the_number_of_threads_changes_nothing():
    student, teacher, labels, _ = operands(97, 1000)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(kd_loss_with_grad(student, teacher, labels))
    finally:
        torch.set_num_threads(threads)
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(grad, results[0][1])


def test_compiles_without_a_break():
    student, teacher, labels, _ = operands()
    student.requires_grad_()

    def training_loss(student):
        return 2 * kd_loss(student * 1.5, teacher, labels)

    (expected,) = torch.autograd.grad(training_loss(student), student)
    torch.compiler.reset()
    compiled = torch.compile(training_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(student), student)[0], expected)


@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_extreme_logits(temperature):
    student, teacher, labels, _ = operands(size=1.0)
    student[0, 0], student[1, 2], teacher[2, 3], teacher[3, 4] = 1e4, -1e4, 1e4, -1e4
    check_against_float64(student, teacher, labels, temperature=temperature)


def test_defaults_and_missing_labels():
    student, teacher, labels, _ = operands(dtype=torch.float64)
    torch.testing.assert_close(kd_loss(student, teacher, labels), expected_loss(student, teacher, labels))
    torch.testing.assert_close(kd_loss(student, teacher), expected_loss(student, teacher))
    assert kd_loss(student, teacher, alpha=0.2) == kd_loss(student, teacher)


def test_equal_logits_have_no_divergence():
    student, *_ = operands()
    loss, grad = kd_loss_with_grad(student, student, temperature=4.0)
    # q and p are the same numbers, but a fused multiply-subtract rounds only one of the two products.
    assert loss == 0 and grad.abs().max() <= 4.0 / len(student) * torch.finfo(torch.float32).eps


def test_masked_classes_are_as_if_absent():
    student, teacher, labels, weight = operands(dtype=torch.float64)
    keep = torch.tensor([0, 2, 3, 5, 6, 7, 10])
    labels = torch.randint(len(keep), labels.shape, generator=torch.Generator().manual_seed(1))
    masked_student, masked_teacher = (torch.full_like(x, -torch.inf) for x in (student, teacher))
    masked_student[:, keep], masked_teacher[:, keep] = student[:, keep], teacher[:, keep]
    options = dict(SETTINGS, weight=weight)

    loss, grad = kd_loss_with_grad(masked_student, masked_teacher, keep[labels], **options)
    short_loss, short_grad = kd_loss_with_grad(student[:, keep], teacher[:, keep], labels, **options)
    torch.testing.assert_close(loss, short_loss)
    torch.testing.assert_close(grad[:, keep], short_grad)
    assert not grad.isnan().any() and grad.count_nonzero() == grad[:, keep].count_nonzero()

    masked_student.requires_grad_()
    (first,) = torch.autograd.grad(
        kd_loss(masked_student, masked_teacher, keep[labels], **options), masked_student, create_graph=True
    )
    torch.testing.assert_close(first.detach(), grad)
    (second,) = torch.autograd.grad(first[:, keep].square().sum(), masked_student)
    assert second.isfinite().all()


def test_teacher_may_exclude_a_class_that_the_student_has():
    student, teacher, _, _ = operands(dtype=torch.float64)
    teacher[:, 4] = -torch.inf
    torch.testing.assert_close(kd_loss(student, teacher), expected_loss(student, teacher))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_backward_honours_the_upstream_gradient(dtype):
    student, teacher, labels, weight = operands(dtype=dtype)
    student.requires_grad_()
    (-3 * kd_loss(student, teacher, labels, weight=weight, **SETTINGS)).backward()
    _, grad = kd_loss_with_grad(student, teacher, labels, weight=weight, scale=-3.0, **SETTINGS)
    torch.testing.assert_close(student.grad, grad)
    upstream = torch.tensor(-3.0)
    _, grad = kd_loss_with_grad(student, teacher, labels, weight=weight, upstream=upstream, **SETTINGS)
    torch.testing.assert_close(student.grad, grad)


def test_first_and_second_derivatives():
    student, teacher, labels, weight = operands(3, 4, torch.float64)
    inputs = tuple(x.double().requires_grad_() for x in (student, teacher, weight[:3]))

    def loss(student, teacher, weight):
        return kd_loss(student, teacher, labels, weight=weight, **SETTINGS)

    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(lambda student: loss(student, *inputs[1:]).square(), inputs[:1])


def test_teacher_gets_no_gradient_unless_it_asks():
    student, teacher, labels, _ = operands()
    student.requires_grad_()
    kd_loss(student, teacher, labels).backward()
    assert student.grad is not None and teacher.grad is None


def test_operands_need_not_be_contiguous():
    student, teacher, labels, weight = operands(8, 12)
    strided = kd_loss_with_grad(student[::2, ::3], teacher[::2, ::3], labels[::2] % 4, weight=weight[::2])
    dense = kd_loss_with_grad(
        student[::2, ::3].contiguous(), teacher[::2, ::3].contiguous(), labels[::2] % 4, weight=weight[::2]
    )
    assert torch.equal(strided[0], dense[0]) and torch.equal(strided[1], dense[1])


def test_never_waits_for_the_device():
    # Meta tensors have no values, so anything that reads one back to the host raises.
    student, teacher, labels, weight = (x.to("meta") for x in operands())
    loss, grad = reference.kd_loss_with_grad(Operands(student, teacher, None, labels, 4.0, 0.9, 0.1, weight), 1.0, None)
    assert loss.shape == () and grad.shape == student.shape


@pytest.mark.parametrize("with_labels", [True, False])
def test_opcheck(with_labels):
    student, teacher, labels, weight = operands(3, 4)
    settings = (None, labels if with_labels else None, 4.0, 0.9, 0.1, weight)
    torch.library.opcheck(torch.ops.stablekd.kd_loss.default, (student.clone().requires_grad_(), teacher, *settings))
    upstream = torch.tensor(0.5)
    torch.library.opcheck(torch.ops.stablekd.kd_loss_with_grad.default, (student, teacher, *settings, 2.0, upstream))


def test_opcheck_of_a_teacher_s_largest_probabilities():
    student, teacher, labels, weight = operands(3, 6)
    probabilities, indices = top_k(teacher, 2, 4.0)
    arguments = (student.requires_grad_(), probabilities, indices, labels, 4.0, 0.9, 0.1, weight)
    torch.library.opcheck(torch.ops.stablekd.kd_loss.default, arguments)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(teacher_logits=torch.zeros(6, 10)), r"teacher_logits is float32 \[6, 10\]"),
        (dict(student_logits=torch.zeros(6, 11, 1)), r"must be a floating point \[N, C\]"),
        (dict(labels=torch.zeros(6)), r"labels is float32 \[6\]; it must be int64 \[6\]"),
        (dict(labels=torch.zeros(5, dtype=torch.int64)), r"labels is int64 \[5\]"),
        (dict(weight=torch.zeros(6, 1)), r"weight is float32 \[6, 1\]"),
        (dict(temperature=0.0), "temperature=0.0"),
        (dict(teacher_logits=None), r"teacher_logits is a NoneType; give a tensor \[N, C\], or \(indices"),
        (
            dict(teacher_logits=(torch.zeros(6, 2), torch.zeros(6, 2))),
            r"indices are float32 \[6, 2\] and its probabilities float32 \[6, 2\]; they must be int64",
        ),
        (dict(label_smoothing=1.0), "label_smoothing=1.0"),
    ],
)
def test_unusable_operands_are_named(change, message):
    student, teacher, labels, _ = operands()
    arguments = dict(student_logits=student, teacher_logits=teacher, labels=labels) | change
    for operator in (kd_loss, kd_loss_with_grad):
        with pytest.raises(ValueError, match=message):
            operator(**arguments)


@pytest.mark.parametrize("label", [-1, 11])
def test_labels_that_are_no_class_are_named(label):
    student, teacher, labels, _ = operands()
    labels[3] = label
    with pytest.raises((ValueError, RuntimeError), match=rf"labels\[3\] is {label}|out of bounds"):
        kd_loss_with_grad(student, teacher, labels)


def test_a_bad_upstream_is_named():
    student, teacher, labels, _ = operands()
    with pytest.raises(ValueError, match=r"upstream is float32 \[1\]; it must be a 0-dim"):
        kd_loss_with_grad(student, teacher, labels, upstream=torch.ones(1))


@pytest.mark.gpu
def test_same_on_the_gpu_without_waiting():
    student, teacher, labels, weight = operands(64, 100)
    expected = kd_loss_with_grad(student, teacher, labels, weight=weight, **SETTINGS)
    on_gpu = [x.cuda() for x in (student, teacher, labels, weight)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = kd_loss_with_grad(*on_gpu[:3], weight=on_gpu[3], **SETTINGS)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(tuple(x.cpu() for x in got), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [1000, 1003])
def test_gradients_too_large_for_the_caches(classes, dtype, monkeypatch):
    """They are written past the caches, by whole vectors: rows begin at every place of one."""
    student, teacher, labels, _ = operands(17200 // dtype.itemsize, classes, dtype)
    poisoned(monkeypatch)
    check_against_float64(student, teacher, labels, temperature=4.0, alpha=0.9, label_smoothing=0.1)
