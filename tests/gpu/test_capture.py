"""CUDA graphs on a GPU: they replay to the bits of eager steps, never wait, never allocate: `pytest -m gpu`."""

import contextlib
import gc
import json

import pytest
import torch
from torch import nn

from stablekd_fast.cli import main
from stablekd_fast.engine.checkpoint import load_tensors
from stablekd_fast.engine.schedule import Optimizer
from stablekd_fast.errors import CaptureError
from stablekd_fast.execution.capture import EagerRunner, make_runner
from stablekd_fast.execution.moments import HostCopy
from stablekd_fast.teacher.live import LiveTeacher

pytestmark = pytest.mark.gpu
real = pytest.mark.usefixtures("real_gpu")

CYCLED = {"cycle": "triangular", "momentum_low": 0.7}
OPTIMIZERS = {
    "adamw": Optimizer("adamw", lr=0.01),
    "adamw foreach": Optimizer("adamw", lr=0.01, implementation="foreach"),
    "adamw clipped, weights only": Optimizer("adamw", lr=0.01, clip=0.5, decay="weights"),
    "sgd nesterov, cycled": Optimizer("sgd", lr=0.05, nesterov=True, weight_decay=5e-4, **CYCLED),
    "sgd clipped": Optimizer("sgd", lr=0.1, clip=1.0, **CYCLED),
}
ALL = [[0, 1, 2, 3]]
APART = [[0], [1], [2], [3]]


def same(one, other):
    return len(one) == len(other) and all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(one, other))


def copies(tensors):
    return [tensor.detach().clone() for tensor in tensors]


@contextlib.contextmanager
def no_waiting():
    """Within it, an operation that makes the host wait for the device is an error."""
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")


def random_states(device):
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


# Bits.


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_replays_give_the_bits_of_eager_steps(small, deterministic, optimizer, precision):
    """42 steps in three stages: rates that cycle, an average, a captured teacher, merges in between."""
    settings = OPTIMIZERS[optimizer]
    if settings.implementation == "foreach" and small.device.type == "cpu":
        pytest.skip("foreach AdamW is for GPUs")
    if settings.implementation == "foreach" and precision == "fp16":
        pytest.skip("fp16 needs an optimizer that can skip a step")
    eager, captured = (small.train(mode, settings, precision) for mode in ("eager", small.captured))
    assert same(eager, captured)
    assert not same(captured, small.train(small.captured, Optimizer("sgd", lr=0.03), precision))


def test_dropout_draws_anew_at_each_replay_and_what_eager_steps_draw(small, deterministic):
    eager, captured = (small.train(mode, OPTIMIZERS["adamw"], dropout=0.3) for mode in ("eager", small.captured))
    assert same(eager, captured)
    drawn = torch.zeros(100, device=small.device)

    def body():
        drawn.copy_(nn.functional.dropout(torch.ones_like(drawn)))

    runner = make_runner(small.captured, [body], [drawn], small.device, fall_back=False)
    seen = []
    for _ in range(5):
        runner.run()
        seen.append(drawn.clone())
    runner.close()
    assert len({tuple(values.tolist()) for values in seen}) == 5


def test_a_captured_teacher_gives_the_live_teacher_s_bits(small, deterministic):
    paired = small.pair("bf16")
    live = LiveTeacher(paired, small.captured, fall_back=False)
    for wanted in ({0, 2}, {3}):
        for seed in range(6):
            images = small.batch(seed).images.to(small.device)
            expected, found = paired.teacher_outputs(images, wanted), live.outputs(images, wanted)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[k], expected[k]) for k in wanted)
    live.close()


@pytest.mark.parametrize("done", [0, 1])
def test_a_stage_of_two_steps_is_captured_before_each_of_them(small, done):
    """The warm-up goes on behind the stage's end."""
    steps = small.steps(small.pair(), APART, count=2)
    for _ in range(done):
        for step in steps:
            step.run()
    with small.runner(steps) as runner:
        runner.run()
    assert [int(step.position) for step in steps] == 4 * [done + 1]
    assert all(torch.isfinite(step.losses).all() for step in steps)


@real
def test_a_run_gives_the_same_student_captured_and_eagerly(tmp_path, deterministic):
    words = ["--subset", "192", "--validation", "32", "--batch-size", "32", "--bn-images", "64", "--device", "cuda"]
    teacher = tmp_path / "teacher"
    ce = ["distill", "--method", "ce", "--student", "resnet20", *words, "--epochs", "1", "--out", str(teacher)]
    assert main(ce) == 0
    students = []
    for capture in ("eager", "cudagraph"):
        out = tmp_path / capture
        run = ["distill", "--teacher", "resnet20", "--teacher-weights", str(teacher / "student.safetensors")]
        run += [
            "--student",
            "resnet20",
            *words,
            "--epochs",
            "6",
            "--ema",
            "0.99",
            "--capture",
            capture,
            "--out",
            str(out),
        ]
        assert main(run) == 0
        assert json.loads((out / "events.jsonl").open().readline())["capture"] == capture
        students.append(load_tensors(out / "student.safetensors")[0])
    assert all(torch.equal(students[0][name], students[1][name]) for name in students[0])


@real
def test_captured_compiled_steps_stay_close_to_compiled_ones(small, deterministic):
    """Nothing but roundings may differ: two compilations may choose other orders of adding."""
    losses = []
    for mode in ("compile", "cudagraph+compile"):
        steps = small.steps(small.pair(), APART, Optimizer("sgd", lr=1e-3), count=6, compiled=True)
        with small.runner(steps, mode) as runner:
            for seed in range(6):
                small.load(steps, seed)
                runner.run()
        losses.append(torch.stack([step.losses for step in steps]))
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-4)
    assert torch.isfinite(losses[0]).all() and losses[0].all()


# Neither waiting nor allocating.


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("optimizer", ["adamw clipped, weights only", "sgd nesterov, cycled"])
def test_neither_eager_nor_captured_steps_wait_for_the_device(small, optimizer, precision):
    paired = small.pair(precision)
    average = {name: p.detach().clone() for name, p in paired.student.named_parameters()}
    steps = small.steps(paired, APART, OPTIMIZERS[optimizer], ema=0.9, average=average)
    for mode in ("eager", small.captured):
        with small.runner(steps, mode) as runner:
            runner.run()
            with no_waiting():
                runner.run()


@real
def test_the_check_of_waiting_can_fail(small):
    with pytest.raises(RuntimeError, match="synchroniz"), no_waiting():
        torch.ones(1, device=small.device).item()


@real
def test_replays_allocate_nothing(small):
    steps = small.steps(small.pair("bf16", dropout=0.1), APART, count=24)
    with small.runner(steps) as runner:
        runner.run()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        for _ in range(20):
            runner.run()
        torch.cuda.synchronize()
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    with small.runner(steps, "eager") as runner:
        runner.run()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] > before


@real
def test_what_a_closed_runner_held_is_free_again(small):
    steps = small.steps(small.pair(), APART)

    def held_after_a_runner():
        with small.runner(steps) as runner:
            runner.run()
        del runner
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    first = held_after_a_runner()  # what libraries keep for good is there from now on
    later = [held_after_a_runner() for _ in range(4)]
    assert max(later) <= first + (64 << 10), (first, later)


def test_after_closing_a_new_runner_trains_on(small, deterministic):
    ends = []
    for modes in (["eager"] * 2, [small.captured] * 2, [small.captured, "eager"]):
        steps = small.steps(small.pair(), ALL, count=8)
        for mode in modes:
            with small.runner(steps, mode) as runner:
                for seed in range(4):
                    small.load(steps, seed)
                    runner.run()
        ends.append(copies(steps[0].state()))
    assert same(ends[0], ends[1]) and same(ends[0], ends[2])


# Capturing changes nothing.


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_making_a_runner_leaves_state_gradients_and_random_numbers_alone(small, precision):
    paired = small.pair(precision, dropout=0.5)
    average = {name: p.detach().clone() for name, p in paired.student.named_parameters()}
    steps = small.steps(paired, APART, ema=0.9, average=average)
    state = [tensor for step in steps for tensor in step.state()]
    before, random = copies(state), random_states(small.device)
    with small.runner(steps) as runner:
        assert same(before, state)
        assert same(random, random_states(small.device))
        assert all(parameter.grad is None for parameter in paired.student.parameters())
        runner.run()
        assert not same(before, state)


def breaking_off(weight, optimizer, how):
    """A step that asks the host between backward and update."""

    def body():
        (nn.functional.dropout(weight, 0.0) ** 2).sum().backward()
        how(weight)
        optimizer.step()
        optimizer.zero_grad()

    return body


def by_item(weight):
    weight.grad.max().item()


def by_waiting(weight):
    torch.cuda.synchronize()


@pytest.mark.parametrize("how", [by_item, by_waiting])
def test_a_step_that_asks_the_host_is_refused_or_trains_on_eagerly(small, how):
    """`by_waiting` is no operation: it is found by the capture itself, which it breaks."""
    if how is by_waiting and small.device.type == "cpu":
        pytest.skip("a CPU cannot be waited for")

    def start():
        weight = nn.Parameter(torch.ones(4, device=small.device))
        return weight, breaking_off(weight, torch.optim.SGD([weight], lr=0.1), how)

    weight, body = start()
    with pytest.raises(
        CaptureError, match="aten._local_scalar_dense" if how is by_item else "aten.* cannot be captured"
    ):
        make_runner(small.captured, [body], [weight], small.device, fall_back=False)
    if small.device.type == "cuda":
        assert torch.cuda.current_stream() == torch.cuda.default_stream()

    weight, body = start()
    with pytest.warns(RuntimeWarning, match="without a captured graph") as caught:
        runner = make_runner(small.captured, [body], [weight], small.device, fall_back=True)
    assert len([warning for warning in caught if warning.category is RuntimeWarning]) == 1
    assert isinstance(runner, EagerRunner) and weight.grad is None
    for _ in range(2):
        runner.run()
    torch.testing.assert_close(weight.detach(), torch.full_like(weight, 0.64))
    # And the device is well: random numbers, and another graph.
    assert nn.functional.dropout(torch.ones(100, device=small.device)).sum() > 0
    steps = small.steps(small.pair(dropout=0.1), APART)
    with small.runner(steps) as sound:
        sound.run()
        assert torch.isfinite(steps[0].losses[-1])


@real
def test_reading_a_learning_rate_from_the_host_in_the_step_is_refused(small):
    weight, rate = torch.zeros(4, device=small.device), 0.1

    def body():
        weight.sub_(torch.tensor(rate).to(small.device) * weight)

    with pytest.raises(CaptureError, match="aten._to_copy.default cannot be captured: it copies a tensor from cpu"):
        make_runner("cudagraph", [body], [weight], small.device, fall_back=False)


# float16.


@pytest.mark.parametrize("optimizer", ["adamw", "sgd nesterov, cycled"])
def test_a_step_with_infinite_gradients_is_skipped_without_waiting(small, optimizer):
    (step,) = small.steps(small.pair("fp16"), ALL, OPTIMIZERS[optimizer])
    weights = list(step.parameters.values())
    scale = 16.0
    with small.runner([step]) as runner:
        step.loss_scale.scale.fill_(scale)
        runner.run()
        assert step.loss_scale.skipped.item() == 0
        before = copies(weights)
        step.loss_scale.scale.fill_(2.0**120)
        with no_waiting():
            runner.run()
        assert step.loss_scale.skipped.item() == 1 and step.loss_scale.scale.item() == 2.0**119
        assert same(before, weights)
        step.loss_scale.scale.fill_(scale)
        with no_waiting():
            runner.run()
        assert step.loss_scale.skipped.item() == 0
        assert not same(before, weights)


# Reading.


def test_what_is_read_arrives_while_the_device_goes_on(small):
    steps = small.steps(small.pair(), APART, count=4)
    with small.runner(steps) as runner:
        for _ in range(3):
            runner.run()
        expected = [step.losses.cpu().clone() for step in steps]
        copied = HostCopy([step.losses for step in steps])
        with no_waiting():
            runner.run()
        values = copied.values()
        assert copied.arrived
        assert all(value.device.type == "cpu" for value in values)
        assert same(values, expected)
        assert not same(values, [step.losses.cpu() for step in steps])
