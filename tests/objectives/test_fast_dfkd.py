"""Distillation without data: the losses against float64, the rounds, and whole runs that read no training image."""

import copy
import dataclasses

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from stablekd_fast.config import DistillConfig
from stablekd_fast.data import Split, open_dataset
from stablekd_fast.data.bank import Bank, BankSource
from stablekd_fast.engine.loop import Engine
from stablekd_fast.engine.schedule import Optimizer
from stablekd_fast.errors import ConfigError
from stablekd_fast.objectives import SynthesisFacts
from stablekd_fast.objectives.fast_dfkd import (
    FastDFKD,
    FastImages,
    agreeing_divergence,
    averaged,
    norm_inputs,
    running_moments,
    statistics_distance,
)
from stablekd_fast.run.distiller import Distiller


def net(width: int, seed: int, norms: bool = True) -> nn.Sequential:
    """Two stages on 8x8 images and a classifier for ten classes, with running statistics of noise."""
    torch.manual_seed(seed)
    norm = nn.BatchNorm2d if norms else lambda width: nn.GroupNorm(2, width)
    made = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, width, 3, 1, 1), norm(width), nn.ReLU()),
        nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), norm(2 * width), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, 10),
    )
    with torch.no_grad():
        for _ in range(20):
            made(torch.randn(32, 3, 8, 8))
    return made.eval()


class Unread(Split):
    """Training images that must not be read; the labels may be."""

    @property
    def images(self):
        raise AssertionError("a training image was read")


@pytest.fixture(scope="module")
def digits():
    whole = open_dataset("digits")
    return dataclasses.replace(whole, train=Unread(whole.train.labels, images=whole.train.images))


@pytest.fixture
def make(tmp_path, digits):
    def build(out="run", dataset=None, teacher=None, **settings):
        options = {"images": 16, "warm_up": 2, "every": 2, "width": 4, "latent": 8, "bank": 96, "steps": 2}
        options |= settings.pop("synthesis_options", {})
        given = {
            "method": "fast-dfkd", "epochs": 3.0, "batch_size": 24, "checkpoint_every": 3, "log_every": 1, "seed": 3,
            "bn_images": 48, "optimizer": Optimizer(lr=0.01), "device": "cpu", "precision": "fp32",
        }  # fmt: skip
        config = DistillConfig(out=str(tmp_path / out), synthesis_options=options, **{**given, **settings})
        return Distiller(config, teacher=teacher or net(8, 1), student=net(4, 2), dataset=dataset or digits)

    return build


def images_of(**changes):
    config = FastDFKD(images=12, warm_up=1, width=4, latent=8, **changes)
    teacher = net(8, 1)
    norms = [module for module in teacher.modules() if isinstance(module, nn.BatchNorm2d)]
    facts = SynthesisFacts(10, (8, 8), (0.4, 0.5, 0.6), (0.2, 0.3, 0.25), 1, False, norms, torch.device("cpu"))
    torch.manual_seed(0)
    return FastImages(config, facts), teacher, net(4, 2)


# The losses.


def test_statistics_are_those_of_float64():
    teacher, images = net(8, 1), torch.randn(20, 3, 8, 8)
    norms = [teacher[0][1], teacher[1][1]]
    with norm_inputs(norms) as found, torch.no_grad():
        teacher(images)
    double, expected = copy.deepcopy(teacher).double(), 0.0
    kept = [(torch.full((c,), 0.5), torch.full((c,), 2.0)) for c in (8, 16)]
    for number, stage in enumerate((double[:1], double[:2])):
        inputs = nn.Sequential(*stage[:-1], stage[-1][0])(images.double()).detach().numpy()
        mean, var = inputs.mean((0, 2, 3)), ((inputs - inputs.mean((0, 2, 3), keepdims=True)) ** 2).mean((0, 2, 3))
        mean, var = 0.7 * 0.5 + 0.3 * mean, 0.7 * 2.0 + 0.3 * var
        expected += np.sqrt(((mean - norms[number].running_mean.numpy()) ** 2).sum())
        expected += np.sqrt(((var - norms[number].running_var.numpy()) ** 2).sum())
    got = statistics_distance(averaged(found, kept, 0.7), running_moments(norms)).item()
    assert got == pytest.approx(expected, rel=1e-5)
    assert averaged(found, [], 0.7) is found
    assert not any(norm._forward_pre_hooks for norm in norms)


def test_the_divergence_counts_where_both_agree():
    torch.manual_seed(0)
    student, teacher = torch.randn(30, 5).double() * 2, torch.randn(30, 5).double() * 2
    student[:10] = teacher[:10] + 0.1 * student[:10]
    s, t = student.numpy(), teacher.numpy()
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (t, s))
    each = (p * (np.log(p) - np.log(q))).sum(1)
    agree = s.argmax(1) == t.argmax(1)
    assert 5 < agree.sum() < 25
    assert agreeing_divergence(student, teacher).item() == pytest.approx((each * agree).sum() / 30, rel=1e-12)


def test_gradients():
    torch.manual_seed(0)
    student, teacher = (torch.randn(6, 4).double().requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(agreeing_divergence, (student, teacher))
    norm = nn.BatchNorm2d(3).double()

    def distance(images):
        with norm_inputs([norm.eval()]) as found:
            norm(images)
        return statistics_distance(found, running_moments([norm]))

    assert torch.autograd.gradcheck(distance, torch.randn(4, 3, 2, 2).double().requires_grad_())


def test_views_are_shifted_and_normalised():
    made, *_ = images_of()
    images = torch.rand(12, 3, 8, 8, requires_grad=True)
    views = made._views(images, torch.Generator().manual_seed(0))
    plain = views * made.normalise.std + made.normalise.mean
    padded, shifts = torch.nn.functional.pad(images, [1] * 4), set()
    for own, view in zip(padded, plain):
        fits = [
            (y, x) for y in range(3) for x in range(3) if torch.allclose(own[:, y : y + 8, x : x + 8], view, atol=1e-6)
        ]
        assert len(fits) == 1
        shifts |= set(fits)
    assert len(shifts) > 3
    views.sum().backward()
    assert images.grad.abs().sum() > 0
    made.facts = dataclasses.replace(made.facts, flip=True, padding=0)
    views = made._views(images, torch.Generator().manual_seed(0))
    whole = made.normalise(images)
    mirrored = [torch.equal(view, own.flip(2)) for view, own in zip(views, whole)]
    assert 0 < sum(mirrored) < 12
    assert all(same or torch.equal(view, own) for same, view, own in zip(mirrored, views, whole))


# The rounds.


@pytest.mark.parametrize("meta", ["first-order", "reptile"])
def test_a_round_is_what_the_formula_says(meta):
    """Written out once more, with the loss of the formula; the warm-up is over."""
    made, teacher, student = images_of(meta=meta, steps=2, bn_momentum=0.0)
    made.rounds, before = 1, copy.deepcopy(made.generator)
    best, classes = made.make(teacher, student, torch.Generator().manual_seed(4))
    random = torch.Generator().manual_seed(4)
    codes = torch.randn(12, 8, generator=random).requires_grad_()
    assert torch.equal(torch.randint(10, (12,), generator=random), classes)
    fitted, norms, summed, losses, seen = copy.deepcopy(before), made.facts.norms, None, [], []
    adam = torch.optim.Adam([{"params": fitted.parameters()}, {"params": [codes], "lr": 0.01}], 3e-3, (0.5, 0.999))
    for _ in range(2):
        images = fitted(codes)
        views, deviation = made._views(images, random), 0.0
        x = views
        for stage, norm in zip(teacher[:2], norms):
            x = stage[0](x)
            deviation = deviation + (x.mean((0, 2, 3)) - norm.running_mean).norm()
            deviation = deviation + (x.var((0, 2, 3), correction=0) - norm.running_var).norm()
            x = stage[2](norm(x))
        theirs, ours = teacher(views), student(views)
        loss = 10 * deviation + 0.4 * torch.nn.functional.cross_entropy(theirs, classes)
        loss = loss - 1.1 * agreeing_divergence(ours, theirs)
        adam.zero_grad()
        loss.backward()
        own = [p.grad.clone() for p in fitted.parameters()]
        summed = own if summed is None else [a + b for a, b in zip(summed, own)]
        losses.append(loss.item())
        seen.append(images.detach())
        adam.step()
    torch.testing.assert_close(best, seen[int(np.argmin(losses))])
    if meta == "reptile":
        summed = [(a - b).detach() for a, b in zip(before.parameters(), fitted.parameters())]
    outer = torch.optim.Adam(before.parameters(), 2 * 3e-3, (0.5, 0.999))
    for parameter, gradient in zip(before.parameters(), summed):
        parameter.grad = gradient
    outer.step()
    for ours, theirs in zip(made.generator.parameters(), before.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_the_adversary_waits_for_the_warm_up():
    calls = []
    made, teacher, student = images_of(steps=1)
    student.register_forward_hook(lambda *_: calls.append(made.rounds))
    for _ in range(3):
        made.make(teacher, student, torch.Generator().manual_seed(0))
    assert calls == [1, 2]


def test_rounds_go_on_from_their_state():
    (one, *networks), (other, *others) = images_of(), images_of()
    one.make(*networks, torch.Generator().manual_seed(0))
    other.generator.first.weight.data.add_(1)
    other.restore({name: value.clone() for name, value in one.state().items()})
    for _ in range(2):
        ours = one.make(*networks, torch.Generator().manual_seed(1))
        theirs = other.make(*others, torch.Generator().manual_seed(1))
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    assert one.state().keys() == other.state().keys()
    assert all(torch.equal(value, other.state()[name]) for name, value in one.state().items())


def test_a_bank_replaces_the_oldest(digits):
    bank = Bank(10, (8, 8))
    source = BankSource(bank, digits.augmentation, digits.mean, digits.std, batch_size=4, seed=0)
    assert bank.filled == 10 and source.steps_per_epoch == 2
    bank.put(torch.full((3, 3, 8, 8), 0.2), torch.tensor([1, 2, 3]))
    assert bank.filled == 3
    batch = next(source.batches(5, 6))
    assert sorted(set(batch.sample_ids.tolist())) == [0, 1, 2] and set(batch.labels.tolist()) == {1, 2, 3}
    bank.put(torch.full((9, 3, 8, 8), 0.6), torch.full((9,), 7))
    assert bank.labels.tolist() == [7, 7, 3, 7, 7, 7, 7, 7, 7, 7] and (bank.images[2] == 51).all()
    assert (bank.images[0] == 153).all() and bank.made == 12
    drawn = [next(source.batches(step, step + 1)).sample_ids.tolist() for step in range(20)]
    assert all(len(set(ids)) == 4 for ids in drawn) and set().union(*map(set, drawn)) == set(range(10))
    other = Bank(10, (8, 8))
    other.restore({name: value.clone() for name, value in bank.state().items()})
    assert torch.equal(other.images, bank.images) and torch.equal(other.labels, bank.labels) and other.made == 12


# Whole runs.


def outcome(distiller):
    distiller.run(progress=False)
    return safetensors.torch.load_file(distiller.checkpoint)


def test_a_run_reads_no_training_image(make):
    distiller = make()
    with pytest.raises(AssertionError, match="a training image was read"):
        _ = distiller.given.dataset.train.images
    with pytest.warns(UserWarning, match="No images are held out"):
        tensors = outcome(distiller)
    made = int(tensors["synthesis/bank/made"])
    assert int(tensors["synthesis/done"]) == 2 + 1 + 11 // 2 and made == 16 * 8
    assert distiller.source.bank.filled == 96


@pytest.mark.filterwarnings("ignore:No images are held out")
def test_what_is_exported_has_the_statistics_of_made_images(make):
    distiller = make()
    tensors = outcome(distiller)
    exported = safetensors.torch.load_file(distiller.checkpoint.parent / "student.safetensors")
    student = net(4, 2)
    student.load_state_dict({n.removeprefix("student/"): v for n, v in tensors.items() if n.startswith("student/")})
    inputs = torch.cat([student[0][0](batch.pixels) for batch in distiller.source.batches(0, 2)])
    torch.testing.assert_close(exported["0.1.running_mean"], inputs.mean((0, 2, 3)).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:No images are held out")
@pytest.mark.parametrize("broken_at", [4, 7])
def test_a_killed_run_ends_with_the_same_bits(make, monkeypatch, broken_at):
    whole, after = outcome(make("whole")), Engine._after_step

    def broken(self, stage):
        after(self, stage)
        if self.progress.step == broken_at:
            raise RuntimeError("killed")

    monkeypatch.setattr(Engine, "_after_step", broken)
    with pytest.raises(RuntimeError, match="killed"):
        make("killed").run(progress=False)
    monkeypatch.undo()
    resumed = outcome(make("killed", resume=True))
    assert whole.keys() == resumed.keys()
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


@pytest.mark.filterwarnings("ignore:No images are held out")
def test_captured_steps_give_the_same_bits(make):
    eager, captured = (outcome(make(mode, capture=mode)) for mode in ("eager", "emulate"))
    assert [name for name in eager if not torch.equal(eager[name], captured[name])] == []


@pytest.mark.filterwarnings("ignore:No images are held out")
def test_made_images_serve_other_methods(make):
    distiller = make(method="stablekd", synthesis="fast-dfkd", cuts=["0", "1"], bridge="average")
    assert int(outcome(distiller)["synthesis/done"]) == 8 and len(distiller.parts.stages) == 2


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"source": "dali-stream"}, "source=dali-stream was given, which reads images"),
        ({"subset": 100}, "subset was given"),
        ({"views": 2}, "views was given"),
        ({"mix": "mixup"}, "mix=mixup was given"),
        ({"method": "ce", "synthesis": "fast-dfkd"}, "has no teacher"),
        ({"synthesis_options": {"bank": 8}}, "bank=8 and batch_size=24 were given"),
        ({"synthesis_options": {"steps": 0}}, "steps=0 was given"),
        ({"synthesis_options": {"meta": "second"}}, "choose first-order or reptile"),
        ({"synthesis_options": {"step": 1}}, "has no option 'step'; the nearest is 'steps'"),
        ({"teacher": net(8, 1, norms=False)}, "the teacher has none; give --synthesis-options.bn-weight=0"),
        ({"method": "kd"}, "synthesis_options were given without synthesis"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:No images are held out")
def test_what_cannot_be_is_refused(make, settings, said):
    with pytest.raises(ConfigError, match=said):
        _ = make(**settings).parts


def test_rows_and_several_processes_are_refused(make, monkeypatch, digits):
    from stablekd_fast.cache import CacheSettings
    from stablekd_fast.config import synthesis_of
    from stablekd_fast.run.synthesised import check_synthesis

    with pytest.raises(ConfigError, match="a place for rows .* was given, which keeps the teacher's answers"):
        _ = make(cache=CacheSettings(plan="all", host_budget="1M")).parts
    config = make().config
    with pytest.raises(ConfigError, match="2 processes was given"):
        check_synthesis(config, synthesis_of(config), 2)


@pytest.mark.filterwarnings("ignore:No images are held out")
def test_a_teacher_without_norms_serves_where_they_do_not_count(make):
    teacher = net(8, 1, norms=False)
    assert "synthesis/done" in outcome(make(teacher=teacher, epochs=1.0, synthesis_options={"bn_weight": 0.0}))


def test_held_out_images_are_taken_where_they_are_asked_for(make, digits):
    whole = open_dataset("digits")
    distiller = make(dataset=whole, validation=50)
    assert len(distiller.parts.validation.split) == 50
    own = dataclasses.replace(digits, validation=whole.test)
    assert make("own", dataset=own).parts.validation.split is whole.test
    with pytest.warns(UserWarning, match="No images are held out"):
        assert make("none", dataset=whole).parts.validation is None
