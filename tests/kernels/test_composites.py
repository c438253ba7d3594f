"""attention_transfer and correlation against numpy-like formulas in float64."""

import pytest
import torch
from torch.nn import functional as F

from stablekd_fast import kernels
from tests.kernels.precision import assert_as_exact_as_pytorch

pytestmark = pytest.mark.parametrize("level", ["baseline"], indirect=True)  # they do not use the core


def attention(student, target):
    maps = [F.normalize(x.pow(2).mean(1).flatten(1), dim=1) for x in (student, target)]
    return (maps[0] - maps[1]).pow(2).mean()


def pearson(student, teacher, temperature=1.0):
    q, p = torch.softmax(student / temperature, 1), torch.softmax(teacher / temperature, 1)
    rows = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(q, p)])
    columns = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(q.T, p.T)])
    return temperature**2 * ((1 - rows).mean() + (1 - columns).mean())


def maps(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((3, 5, 4, 6), (3, 7, 4, 6))
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def logits(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return tuple((3 * torch.randn(6, 11, generator=generator)).to(dtype) for _ in range(2))


CASES = {
    "attention_transfer": (attention, maps),
    "correlation": (pearson, logits),
}
each = pytest.mark.parametrize("name", list(CASES))


def both(name):
    return getattr(kernels, name), getattr(kernels, f"{name}_with_grad")


@each
def test_agrees_with_the_formula(name):
    plain, draw = CASES[name]
    loss, with_grad = both(name)
    for seed in range(5):
        operands = draw(seed, torch.float64)
        student = operands[0].clone().requires_grad_()
        expected = plain(student, operands[1])
        (expected_grad,) = torch.autograd.grad(expected, student)
        torch.testing.assert_close(loss(*operands), expected.detach())
        upstream = torch.tensor(0.5, dtype=torch.float64)
        options = dict(upstream=upstream, **{"weight" if name == "attention_transfer" else "scale": 3.0})
        value, grad = with_grad(*operands, **options)
        torch.testing.assert_close(value, 1.5 * expected.detach())
        torch.testing.assert_close(grad, 1.5 * expected_grad)
        assert not value.requires_grad and not grad.requires_grad


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_exact_as_pytorch(name, dtype):
    plain, draw = CASES[name]
    if name == "correlation":

        def plain(student, teacher):  # corrcoef has no bf16
            q, p = torch.softmax(student, 1), torch.softmax(teacher, 1)
            pairs = [(q - q.mean(d, keepdim=True), p - p.mean(d, keepdim=True)) for d in (1, 0)]
            return sum(1 - F.cosine_similarity(*pair, dim=d).mean() for pair, d in zip(pairs, (1, 0)))

    assert_as_exact_as_pytorch(both(name)[1], plain, [draw(seed, dtype) for seed in range(4)])


@each
def test_first_and_second_derivatives(name):
    inputs = tuple(x[:2].clone().requires_grad_() for x in CASES[name][1](0, torch.float64))
    loss, _ = both(name)
    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


@each
def test_upstream_gradient_and_memory_format(name):
    student, target = CASES[name][1]()
    if name == "attention_transfer":
        student = student.to(memory_format=torch.channels_last)
    else:
        student = student.T.contiguous().T
    student.requires_grad_()
    loss, with_grad = both(name)
    (-3 * loss(student, target)).backward()
    grad = -3 * with_grad(student, target)[1]
    torch.testing.assert_close(student.grad, grad)
    assert grad.stride() == student.stride()


@each
def test_compiles_without_a_break(name):
    operands = CASES[name][1]()
    _, with_grad = both(name)
    expected = with_grad(*operands)
    torch.compiler.reset()

    def both_faces(student, target):
        leaf = student * 1.0
        return both(name)[0](leaf, target)

    compiled = torch.compile(both_faces, fullgraph=True, backend="aot_eager")
    student = operands[0].clone().requires_grad_()
    value = compiled(student, operands[1])
    torch.testing.assert_close(value.detach(), expected[0])
    torch.testing.assert_close(torch.autograd.grad(value, student)[0], expected[1])


@each
def test_extremes_stay_finite(name):
    student, target = CASES[name][1]()
    zero = torch.zeros_like(student)
    _, with_grad = both(name)
    for a, b in ((zero, target), (student, torch.zeros_like(target)), (zero, torch.zeros_like(target))):
        value, grad = with_grad(a, b)
        assert value.isfinite() and grad.isfinite().all()
    if name != "attention_transfer":
        student[0, 0], target[1, 1], student[2, 2] = 1e4, 1e4, -1e4
        for temperature in (0.5, 20.0):
            value, grad = with_grad(student, target, temperature=temperature)
            assert value.isfinite() and grad.isfinite().all()


@each
def test_never_waits_for_the_device(name):
    operands = tuple(x.to("meta") for x in CASES[name][1]())
    loss, grad = both(name)[1](*operands)
    assert loss.shape == () and grad.shape == operands[0].shape


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: kernels.attention_transfer(torch.zeros(2, 3), torch.zeros(2, 3)), r"student is float32 \[2, 3\]"),
        (
            lambda: kernels.attention_transfer(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 8, 8)),
            "height and width must agree",
        ),
        (lambda: kernels.attention_transfer(*maps(), power=0.5), "power=0.5"),
        (lambda: kernels.correlation(*logits(), temperature=0.0), "temperature=0.0"),
        (lambda: kernels.correlation_with_grad(*logits(), upstream=torch.ones(1)), "0-dim"),
    ],
)
def test_unusable_operands_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
