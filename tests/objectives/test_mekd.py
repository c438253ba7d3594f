"""Distillation from a black box: the losses against float64, what is asked of the teacher, and whole runs."""

import dataclasses

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from stablekd_fast import black_box
from stablekd_fast.config import DistillConfig
from stablekd_fast.data import Split, open_dataset
from stablekd_fast.engine.loop import Engine
from stablekd_fast.engine.schedule import Optimizer
from stablekd_fast.errors import ConfigError, ModelError
from stablekd_fast.objectives import Facts, StepBatch
from stablekd_fast.objectives.mekd import MEKD, MappingEmulation, generator_loss, judge_loss
from stablekd_fast.run.distiller import Distiller


def net(width: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(4 * width, 10),
    )  # fmt: skip


class Only:
    """Can be called, and nothing else: whatever is asked of it fails."""

    def __call__(self, images):
        return answers(images)

    def __getattribute__(self, name):
        raise AssertionError(f"{name} of the black box was asked for")


NETWORK = net(8, 1).eval()


@torch.no_grad()
def answers(images):
    assert images.dtype == torch.float32 and not images.requires_grad and not torch.is_grad_enabled()
    return NETWORK(images).softmax(1)


def labels_only(images):
    return answers(images).argmax(1).numpy()


@pytest.fixture(scope="module")
def digits():
    return open_dataset("digits")


@pytest.fixture
def make(tmp_path, digits):
    def build(out="run", teacher=None, dataset=None, **settings):
        given = {
            "method": "mekd", "epochs": 2.0, "batch_size": 32, "subset": 160, "validation": 40, "log_every": 1,
            "seed": 3, "bn_images": 64, "optimizer": Optimizer(lr=0.01), "device": "cpu", "precision": "fp32",
            "checkpoint_every": 2, "auxiliary_options": {"steps": 3, "width": 4, "lr": 0.01},
        }  # fmt: skip
        if settings.get("method", "mekd") != "mekd":
            given.pop("auxiliary_options")
        config = DistillConfig(out=str(tmp_path / out), **{**given, **settings})
        teacher = black_box(teacher or Only(), classes=10)
        return Distiller(config, teacher=teacher, student=net(4, 2), dataset=dataset or digits)

    return build


def outcome(distiller):
    distiller.run(progress=False)
    return safetensors.torch.load_file(distiller.checkpoint)


def emulation(**options):
    facts = Facts(
        10, 100, 6, (8, 8), [(10,)], [(10,)], [], torch.device("cpu"), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25)
    )
    torch.manual_seed(0)
    return MappingEmulation(MEKD(**{"steps": 2, "width": 4, **options}), facts)


# The losses.


def test_adversarial_losses_are_those_of_float64():
    torch.manual_seed(0)
    real, made, sure = torch.randn(7).double(), torch.randn(7).double(), torch.rand(7).double()
    r, m, s = (x.numpy() for x in (real, made, sure))
    d = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    assert judge_loss(real, made).item() == pytest.approx(-np.log(d(r)).mean() - np.log(1 - d(m)).mean(), rel=1e-12)
    assert generator_loss(made, None, 0.3).item() == pytest.approx(-np.log(d(m)).mean(), rel=1e-12)
    expected = -np.log(d(m)).mean() - 0.3 * (s * np.log(d(m))).mean()
    assert generator_loss(made, sure, 0.3).item() == pytest.approx(expected, rel=1e-12)


def test_answers_are_compared_as_images():
    """The generator written out once more, in float64, from its buffers."""
    loss, torch_random = emulation(weight=0.7, temperature=2.0), torch.manual_seed(1)
    for name, value in loss.generator.named_buffers():
        if value.is_floating_point():
            drawn = torch.randn(value.shape, generator=torch_random)
            value.copy_(drawn.abs() + 0.1 if "var" in name else 0.5 * drawn)
    student, teacher = torch.randn(6, 10, requires_grad=True), torch.randn(6, 10)
    got = loss(StepBatch(torch.zeros(6, 3, 8, 8), {0: teacher}, None), {0: student}, None)
    held, functional = {n: v.double() for n, v in loss.generator.named_buffers()}, torch.nn.functional

    def image(logits):
        x = (logits.double() / 2).softmax(1) @ held["first.weight"].T + held["first.bias"]
        x = x.view(6, 8, 2, 2)
        for norm, conv in ((0, 2), (3, 6), (7, 9)):
            parts = [held[f"layers.{norm}.{n}"] for n in ("running_mean", "running_var", "weight", "bias")]
            mean, var, scale, shift = (part[:, None, None] for part in parts)
            x = (x - mean) / (var + 1e-5).sqrt() * scale + shift
            x = x if norm == 0 else torch.where(x > 0, x, 0.2 * x)
            x = x if norm == 7 else x.repeat_interleave(2, 2).repeat_interleave(2, 3)
            x = functional.conv2d(x, held[f"layers.{conv}.weight"], held.get(f"layers.{conv}.bias"), padding=1)
        return 1 / (1 + (-x).exp())

    own = student.detach().double().requires_grad_()
    expected = 0.7 * (image(own) - image(teacher)).abs().mean()
    assert got.item() == pytest.approx(expected.item(), rel=1e-4) and got.item() > 1e-3
    (gradient,), (wanted,) = torch.autograd.grad(got, student), torch.autograd.grad(expected, own)
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-2, atol=1e-4 * wanted.abs().max().item())
    assert list(loss.parameters()) == []


def test_the_generator_learns_to_pass_for_real():
    """Against images of one colour: what it makes comes to have it."""
    loss, asked = emulation(steps=60, lr=0.02), []
    real = loss.normalise(torch.tensor([0.9, 0.1, 0.5]).view(1, 3, 1, 1).expand(6, 3, 8, 8))

    def teacher(images):
        asked.append(images.requires_grad)
        return NETWORK(images)

    codes = torch.randn(50, 10).softmax(1)

    def distance():
        return (loss.normalise(loss.generator(codes)) - real[:1]).abs().mean().item()

    before = distance()
    loss.learn(iter(lambda: real, None), teacher)
    assert distance() < 0.5 * before and asked == [False] * 60 and bool(loss.learned)
    kept = {name: value.clone() for name, value in loss.state_dict().items()}
    loss.learn(iter([]), teacher)
    assert all(torch.equal(value, kept[name]) for name, value in loss.state_dict().items())
    assert not any(value.requires_grad for value in loss.buffers()) and not loss.generator.training


def test_without_a_weight_nothing_is_asked():
    loss = emulation(answer_weight=0.0)
    loss.learn(iter(lambda: torch.zeros(6, 3, 8, 8), None), None)
    assert loss.learned


# What a black box may answer.


def test_answers_become_logits():
    images = torch.randn(5, 3, 8, 8)
    logits = black_box(Only(), classes=10)(images)
    torch.testing.assert_close(logits.softmax(1), answers_without_grad(images))
    hard = black_box(labels_only, classes=10)(images)
    assert torch.equal(hard.argmax(1), logits.argmax(1)) and (hard.softmax(1).amax(1) > 0.9999).all()


def answers_without_grad(images):
    with torch.no_grad():
        return answers(images)


@pytest.mark.parametrize(
    "answer, said",
    [
        (lambda images: NETWORK(images), "which are no probabilities"),
        (lambda images: torch.full((len(images), 10), 0.2), "which are no probabilities"),
        (lambda images: torch.full((len(images), 9), 1 / 9), r"answered \[2, 9\] float32 to 2 images"),
        (lambda images: torch.zeros(len(images)), r"answered \[2\] float32"),
        (lambda images: torch.full((len(images),), 10), "from 10 to 10. Have it answer one label"),
        (lambda images: torch.zeros(3, dtype=torch.int64), "answered 3 labels to 2 images"),
    ],
)
def test_other_answers_are_refused(make, answer, said):
    with pytest.raises(ModelError, match=said):
        _ = make(teacher=answer).materials


def test_what_is_no_black_box_is_refused():
    with pytest.raises(ConfigError, match="A Tensor was given as a black box"):
        black_box(torch.zeros(3), classes=10)
    with pytest.raises(ConfigError, match="classes=1 was given"):
        black_box(Only(), classes=1)


# Whole runs.


def test_a_run_only_calls_the_teacher(make):
    tensors = outcome(make())
    assert tensors["auxiliary/learned"] and "auxiliary/generator.first.weight" in tensors
    assert not any("auxiliary" in name for name in tensors if name.startswith("optimizer"))
    exported = safetensors.torch.load_file(make().checkpoint.parent / "student.safetensors")
    assert exported.keys() == net(4, 2).state_dict().keys()


def test_labels_alone_will_do(make):
    tensors = outcome(make(teacher=labels_only))
    assert all(value.isfinite().all() for value in tensors.values())


def test_labels_of_the_data_set_are_not_used(make, digits):
    def relabelled(labels):
        return dataclasses.replace(digits, train=Split(labels, images=digits.train.images))

    same = {"subset": None, "validation": 0, "epochs": 0.1}
    plain, other = digits.train.labels, digits.train.labels.flip(0)
    one, two = (outcome(make(str(n), dataset=relabelled(v), **same)) for n, v in enumerate((plain, other)))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    weighed = {**same, "logits_options": {"ce_weight": 1.0}}
    one, two = (outcome(make(f"w{n}", dataset=relabelled(v), **weighed)) for n, v in enumerate((plain, other)))
    assert not all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.mark.parametrize("broken_at", [0, 3])
def test_a_killed_run_ends_with_the_same_bits(make, monkeypatch, broken_at):
    whole, train_step = outcome(make("whole")), Engine._train_step

    def broken(self, stage, feed):
        if self.progress.step == broken_at:
            raise RuntimeError("killed")
        train_step(self, stage, feed)

    monkeypatch.setattr(Engine, "_train_step", broken)
    with pytest.raises(RuntimeError, match="killed"):
        make("killed").run(progress=False)
    monkeypatch.undo()
    learned = []
    monkeypatch.setattr(MappingEmulation, "_learn_from", lambda self, *given: learned.append(given))
    resumed = outcome(make("killed", resume=True))
    assert whole.keys() == resumed.keys() and learned == []
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


def test_captured_steps_give_the_same_bits(make):
    eager, captured = (outcome(make(mode, capture=mode)) for mode in ("eager", "emulate"))
    assert [name for name in eager if not torch.equal(eager[name], captured[name])] == []


def test_the_next_batch_may_come_in_low_precision(make):
    assert outcome(make(precision="bf16"))["auxiliary/learned"]


def test_answers_are_kept_where_rows_are(make):
    from stablekd_fast.cache import CacheSettings

    calls = []

    def counted(images):
        calls.append(len(images))
        return answers(images)

    for number, cache in enumerate((CacheSettings(), CacheSettings(plan="all", host_budget="10M"))):
        calls.append(-1)
        settings = {"epochs": 4.0, "views": 1, "auxiliary_options": {"steps": 1, "width": 4}}
        outcome(make(str(number), teacher=counted, cache=cache, **settings))
    second = calls.index(-1, 1)
    assert sum(calls[second + 1 :]) < sum(calls[1:second]) - 300


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"method": "stablekd"}, "needs the teacher's outputs at cuts, as it is set, but the teacher is a black box"),
        ({"method": "fitnet"}, "outputs at cuts"),
        ({"cuts": ["0"]}, "outputs at cuts"),
        ({"method": "fast-dfkd", "subset": None}, "needs the teacher's gradients"),
        ({"auxiliary_options": {"steps": 0}}, "steps=0 was given"),
        ({"auxiliary_options": {"answer_weight": -1}}, "answer_weight=-1 was given"),
    ],
)
def test_what_cannot_be_is_refused(make, settings, said):
    with pytest.raises(ConfigError, match=said):
        _ = make(**settings).parts


def test_several_processes_are_refused(make):
    from stablekd_fast.config import objectives_of

    aims = objectives_of(make().config)
    with pytest.raises(ConfigError, match="mekd learns before the first step, which 2 processes"):
        aims.check([[[0]]], 0, accumulate=1, ranks=2, mix=None)
