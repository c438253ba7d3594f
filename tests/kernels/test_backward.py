"""What the losses' backward hands out: the gradient that was made with the loss, which nobody else reads or writes."""

import pytest
import torch
from torch.profiler import profile

from stablekd_fast import kernels

LOSSES = {
    "mse": lambda student, target: kernels.feature_mse(student, target),
    "power": lambda student, target: kernels.feature_mse(student, target, normalize="power"),
    "cosine": lambda student, target: kernels.feature_cosine(student, target),
    "at": lambda student, target: kernels.attention_transfer(as_maps(student), as_maps(target)),
    "kd": lambda student, target: kernels.kd_loss(student, target),
    "dkd": lambda student, target: kernels.decoupled_kl(student, target, torch.arange(len(student))),
    "gkd": lambda student, target: kernels.grouped_kl(student, target),
    "logit-std": lambda student, target: kernels.standardised_kd_loss(student, target),
    "dist": lambda student, target: kernels.correlation(student, target),
}


def as_maps(features):
    """`[6, 40]` as maps of 4 channels at 2 times 5 places."""
    return features.view(6, 4, 2, 5)


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(params=LOSSES)
def loss(request):
    return LOSSES[request.param]


def operands(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    student, target = (torch.randn(6, 40, generator=generator).to(dtype) for _ in range(2))
    return student.requires_grad_(), target


def passes(run):
    """Names of torch's operators that fill or multiply while `run` runs."""
    with profile() as found:
        run()
    return [event.name for event in found.events() if event.name.startswith(("aten::mul", "aten::zero"))]


def test_an_upstream_of_one_costs_no_pass(loss):
    student, target = operands()
    value = loss(student, target)
    assert not passes(value.backward)
    value = 2 * loss(student, target)
    assert passes(value.backward)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("upstream", [1.0, 0.375])
def test_a_retained_graph_gives_the_same_bits_whatever_became_of_the_first_gradient(loss, dtype, upstream):
    student, target = operands(dtype)
    value = loss(student, target)
    upstream = torch.tensor(upstream, dtype=value.dtype)
    value.backward(upstream, retain_graph=True)
    first = student.grad.clone()
    value.backward(upstream, retain_graph=True)  # accumulates into what the first one handed out
    assert torch.equal(student.grad, 2 * first)
    student.grad.fill_(torch.nan)
    handed = torch.autograd.grad(value, student, upstream, retain_graph=True)[0]
    assert torch.equal(handed, first)
    handed.zero_()
    assert torch.equal(torch.autograd.grad(value, student, upstream)[0], first)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_upstream_that_is_not_one_multiplies(loss, dtype):
    student, target = operands(dtype)
    plain, scaled = (
        torch.autograd.grad(loss(student, target), student, torch.tensor(upstream, dtype=torch.float64))[0]
        for upstream in (1.0, -4.0)
    )
    assert torch.equal(scaled, -4 * plain) or dtype == torch.float16
    torch.testing.assert_close(scaled, -4 * plain)


def test_gradients_of_two_losses_of_one_student_add_up(loss):
    student, target = operands()
    alone = torch.autograd.grad(loss(student, target), student)[0]
    values = [loss(student, target), loss(student, target)]
    sum(values).backward(retain_graph=True)
    assert torch.equal(student.grad, 2 * alone)
    values[0].backward()
    assert torch.equal(student.grad, 3 * alone)


def test_a_loss_that_is_kept_keeps_no_gradient(loss):
    student, target = operands()
    value = loss(student, target)
    value.backward()
    assert value.grad_fn.own is None


def test_a_batch_of_upstreams_is_multiplied_one_by_one(loss):
    student, target = operands()
    value = loss(student, target)
    upstreams = torch.tensor([1.0, 2.0])
    found = torch.autograd.grad(value, student, upstreams, is_grads_batched=True, retain_graph=True)[0]
    one = torch.autograd.grad(value, student)[0]
    assert torch.equal(found, torch.stack([one, 2 * one]))


def test_compiled_functions_agree(loss):
    student, target = operands()
    expected = torch.autograd.grad(loss(student, target), student)[0]
    torch.compiler.reset()
    compiled = torch.compile(lambda *given: 4 * loss(*given), backend="aot_eager")
    assert torch.equal(torch.autograd.grad(compiled(student, target), student)[0], 4 * expected)
    torch.compiler.reset()


def test_second_derivatives_come_after_the_gradient_was_handed_out(loss):
    student, target = operands(torch.float64)
    value = loss(student, target)
    first = torch.autograd.grad(value, student, retain_graph=True)[0]
    again = torch.autograd.grad(value, student, create_graph=True)[0]
    torch.testing.assert_close(again, first)
    assert torch.autograd.grad(again.square().sum(), student)[0].isfinite().all()
