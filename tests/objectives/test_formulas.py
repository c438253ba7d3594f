"""The losses of the objectives against their published formulas, written out with numpy in float64."""

import dataclasses

import numpy as np
import pytest
import torch

from stablekd_fast.objectives import Facts, StepBatch, objective
from stablekd_fast.objectives.cckd import CCKD, ConfidenceConditioned
from stablekd_fast.objectives.ckd import CKD, Contrast
from stablekd_fast.objectives.crd import CRD, ContrastiveRepresentation
from stablekd_fast.objectives.dlb import DLB, LastBatch
from stablekd_fast.objectives.fitnet import FitNet, Hint
from stablekd_fast.objectives.kdiga import KDIGA, InputGradients
from stablekd_fast.objectives.mix_kd import EntropyPick, Pick
from stablekd_fast.objectives.r2kd import R2KD, RobustnessReinforced, correlation, pruned, soft_ranks
from stablekd_fast.objectives.reviewkd import Review, ReviewKD, pyramid_distance

N, C = 6, 5


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def facts(**changed):
    made = Facts(
        classes=C, samples=20, batch_size=N, size=(4, 4), student_shapes=[(3, 4, 4), (4, 2, 2), (C,)],
        teacher_shapes=[(5, 4, 4), (6, 2, 2), (C,)], channel_axes=[1, 1], device=torch.device("cpu"), teacher=None,
    )  # fmt: skip
    return dataclasses.replace(made, **changed)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl(p, q):
    return (p * (np.log(p) - np.log(q))).sum(-1)


def cross_entropy(logits, labels):
    return -np.log(softmax(logits))[np.arange(len(labels)), labels]


def logits():
    return torch.randn(N, C, requires_grad=True), torch.randn(N, C), torch.randint(C, (N,))


def as_numpy(*tensors):
    return [t.detach().numpy() for t in tensors]


def pearson(a, b):
    a, b = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
    return (a * b).sum(-1) / np.sqrt((a**2).sum(-1) * (b**2).sum(-1))


def dkd(s, t, y):
    mask = np.eye(C, dtype=bool)[y]
    p, q = softmax(t / 4), softmax(s / 4)
    pair = [np.stack([x[mask], 1 - x[mask]], 1) for x in (p, q)]
    others = [x[~mask].reshape(N, C - 1) / (1 - x[mask])[:, None] for x in (p, q)]
    return 16 * (kl(*pair) + 8 * kl(*others)).mean() + cross_entropy(s, y).mean()


def dist(s, t, y):
    p, q = softmax(t), softmax(s)
    return (1 - pearson(p, q)).mean() + (1 - pearson(p.T, q.T)).mean() + cross_entropy(s, y).mean()


def logit_std(s, t, y):
    s_, t_ = ((x - x.mean(1, keepdims=True)) / x.std(1, ddof=1, keepdims=True) for x in (s, t))
    return 9 * 4 * kl(softmax(t_ / 2), softmax(s_ / 2)).mean() + cross_entropy(s, y).mean()


@pytest.mark.parametrize(("name", "formula"), [("dkd", dkd), ("dist", dist), ("logit-std", logit_std)])
@pytest.mark.parametrize("upstream", [None, 3.0])
def test_losses_at_the_head(name, formula, upstream):
    student, teacher, labels = logits()
    loss = objective("logits", name)
    factor = None if upstream is None else torch.tensor(upstream)
    value, gradient = loss(student.detach(), teacher, labels, factor)
    assert value.item() == pytest.approx(formula(*as_numpy(student, teacher, labels)), rel=1e-6)
    numeric = differences(lambda s: formula(s, *as_numpy(teacher, labels)), student.detach().numpy())
    torch.testing.assert_close(gradient, (upstream or 1.0) * torch.from_numpy(numeric), rtol=1e-5, atol=1e-7)


def differences(function, at, step=1e-6):
    """The gradient of a function of an array by central differences."""
    gradient = np.zeros_like(at)
    for place in np.ndindex(*at.shape):
        moved = np.zeros_like(at)
        moved[place] = step
        gradient[place] = (function(at + moved) - function(at - moved)) / (2 * step)
    return gradient


@pytest.mark.parametrize("axis", [1, -1])
def test_attention_transfer(axis):
    """Also on tokens, whose channels come last, and with other channels than the teacher's."""
    student, target = torch.randn(N, 3, 4, 4), torch.randn(N, 5, 4, 4)
    if axis == -1:
        student, target = student.flatten(2).mT.contiguous(), target.flatten(2).mT.contiguous()

    def formula(s):
        maps = [(x**2).mean(axis).reshape(N, -1) for x in (s, target.numpy())]
        maps = [x / np.sqrt((x**2).sum(1, keepdims=True)) for x in maps]
        return 1000 * ((maps[0] - maps[1]) ** 2).mean()

    value, gradient = objective("feature", "at")(student, target, axis)
    assert value.item() == pytest.approx(formula(student.numpy()), rel=1e-6)
    numeric = differences(formula, student.numpy())
    torch.testing.assert_close(gradient, torch.from_numpy(numeric), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("variant", ["loss", "target"])
def test_cckd_weighs_by_the_teachers_confidence_and_rests_learnt_samples(variant):
    student, teacher, labels = logits()
    ids = torch.tensor([3, 7, 11, 2, 19, 0])
    own = ConfidenceConditioned(CCKD(variant=variant), facts(student_shapes=[(C,)]))
    batch = StepBatch(student, {0: teacher}, labels, ids=ids)
    s, t, y = as_numpy(student, teacher, labels)
    p = softmax(t)[np.arange(N), y]
    soft = softmax(t / 4)
    if variant == "loss":
        terms = (1 - p) * cross_entropy(s, y) + p * 16 * kl(soft, softmax(s / 4))
    else:
        target = (1 - p)[:, None] * np.eye(C)[y] + p[:, None] * soft
        terms = -(target * np.log(softmax(s))).sum(1)
    assert own(batch, {0: student}, None).item() == pytest.approx(terms.mean(), rel=1e-9)
    learnt = softmax(s)[np.arange(N), y] > p
    assert learnt.any() and not learnt.all()
    assert own.learnt[ids].numpy().astype(bool).tolist() == learnt.tolist() and own.learnt.sum() == learnt.sum()
    assert own(batch, {0: student}, None).item() == pytest.approx((terms * ~learnt).mean(), rel=1e-9)
    torch.autograd.gradcheck(lambda s: own(batch, {0: s}, None), student)


def test_ckd_contrasts_with_the_batch_and_with_a_queue_that_wraps():
    given = facts(teacher_shapes=[(5, 4, 4), (4, 2, 2), (C,)])
    own = Contrast(CKD(queue=8, temperature=0.1), given)
    kept = np.zeros((0, 4))
    for _ in range(3):
        student, teacher = torch.randn(N, 4, 2, 2, requires_grad=True), torch.randn(N, 4, 2, 2)
        s, t = (x.mean((2, 3)) for x in as_numpy(student, teacher))
        s, t = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (s, t))
        cosines = np.concatenate([s @ t.T, s @ kept.T], 1) / 0.1
        expected = -np.log(softmax(cosines)[np.arange(N), np.arange(N)]).mean()
        loss = own(StepBatch(student, {1: teacher}, None), {1: student}, None)
        assert loss.item() == pytest.approx(expected, rel=1e-9)
        loss.backward()
        assert student.grad is not None and student.grad.abs().sum() > 0
        kept = np.concatenate([kept, t])[-8:]


def test_crd_is_noise_contrastive_estimation_against_two_memories():
    given, config = facts(), CRD(negatives=7, dimensions=8)
    own = ContrastiveRepresentation(config, given)
    a, b = (torch.nn.functional.normalize(torch.randn(N, 8), dim=1) for _ in range(2))
    places = torch.randint(20, (N, 8))
    expected, constants = 0.0, []
    for anchor, memory in ((a, own.teachers), (b, own.students)):
        raw = np.exp(np.einsum("nkd,nd->nk", memory.numpy()[places.numpy()], anchor.numpy()) / 0.07)
        constants.append(raw.mean() * 20)
        h = raw / constants[-1]
        noise = 7 / 20
        expected -= (np.log(h[:, 0] / (h[:, 0] + noise)) + np.log(noise / (h[:, 1:] + noise)).sum(1)).mean()
    assert own.contrast(a, b, places).item() == pytest.approx(expected, rel=1e-5)
    assert own.constants.tolist() == pytest.approx(constants)
    own.contrast(b, a, places)
    assert own.constants.tolist() == pytest.approx(constants)  # the first step fixes them


def test_crd_moves_the_memory_of_the_samples_seen_alone():
    own = ContrastiveRepresentation(CRD(negatives=4, dimensions=8), facts())
    before, ids = own.students.clone(), torch.tensor([4, 1, 9, 16, 3, 12])
    student = torch.randn(N, 4, 2, 2, requires_grad=True)
    own(StepBatch(student, {1: torch.randn(N, 6, 2, 2)}, None, ids=ids), {1: student}, None).backward()
    moved = (own.students != before).any(1)
    assert moved.nonzero()[:, 0].tolist() == sorted(ids.tolist())
    new = torch.nn.functional.normalize(own.student(student.mean((2, 3))), dim=1)
    expected = torch.nn.functional.normalize(0.5 * before[ids] + 0.5 * new, dim=1)
    torch.testing.assert_close(own.students[ids], expected)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in own.parameters())


def test_dlb_asks_for_the_last_prediction_again():
    own = LastBatch(DLB(weight=2.0), facts(student_shapes=[(C,)]))
    network = torch.nn.Linear(7, C)
    kept = None
    for _ in range(3):
        images, second, labels = torch.randn(N, 7), torch.randn(N, 7), torch.randint(C, (N,))
        now, again = network(images), network(second)
        loss = own(StepBatch(images, {}, labels, second=second), {0: now}, lambda x: {0: network(x)})
        if kept is None:
            expected = 0.5 * cross_entropy(*as_numpy(now, labels)).mean()
        else:
            a = again.detach().numpy()
            repeated = 9 * kl(softmax(kept[0] / 3), softmax(a / 3)).mean()
            expected = 0.5 * cross_entropy(a, kept[1]).mean() + 2 * repeated
        assert loss.item() == pytest.approx(expected, rel=1e-9)
        kept = as_numpy(now, labels)


def test_fitnet_regresses_to_the_teachers_width():
    own = Hint(FitNet(weight=2.0, cut=2), facts())
    student, teacher = torch.randn(N, 4, 2, 2, requires_grad=True), torch.randn(N, 6, 2, 2)
    hint = np.einsum("nchw,dc->ndhw", student.detach().numpy(), own.regressor.weight.detach().numpy())
    expected = 2 * ((hint - teacher.numpy()) ** 2).mean()
    loss = own(StepBatch(student, {1: teacher}, None), {1: student}, None)
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    loss.backward()
    assert student.grad is not None and own.regressor.weight.grad is not None


def test_kdiga_measures_the_distance_of_input_gradients():
    networks = [torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 9), torch.nn.Tanh(), torch.nn.Linear(9, C))
                for _ in range(2)]  # fmt: skip
    student, teacher = networks
    own = InputGradients(KDIGA(weight=10.0), facts(student_shapes=[(C,)], teacher=teacher))
    images, labels = torch.randn(N, 3, 2, 2), torch.randint(C, (N,))

    def gradient(network):
        return differences(
            lambda x: cross_entropy(network(torch.from_numpy(x)).detach().numpy(), labels.numpy()).mean(),
            images.numpy(),
        )

    entry = images.clone().requires_grad_(True)
    loss = own(StepBatch(entry, {}, labels), {0: student(entry)}, None)
    assert loss.item() == pytest.approx(10 / N * np.linalg.norm(gradient(student) - gradient(teacher)), rel=1e-6)
    loss.backward()  # through the student's gradient, to its weights
    weight, grown = student[1].weight, 1e-5

    def at(delta):
        with torch.no_grad():
            weight[0, 0] += delta
        entry = images.clone().requires_grad_(True)
        value = own(StepBatch(entry, {}, labels), {0: student(entry)}, None).item()
        with torch.no_grad():
            weight[0, 0] -= delta
        return value

    assert weight.grad[0, 0].item() == pytest.approx((at(grown) - at(-grown)) / (2 * grown), rel=1e-4)
    assert all(p.grad is None for p in teacher.parameters())


def test_mix_kd_picks_where_the_teacher_is_least_certain():
    own = Pick(EntropyPick(picked=0.5), facts(student_shapes=[(C,)]))
    teacher, images = torch.randn(N, C), torch.randn(N, 3, 4, 4)
    p = softmax(teacher.numpy())
    picked = np.sort(np.argsort(-(p * np.log(p)).sum(1))[-3:])
    batch = own.prepare(StepBatch(images, {0: teacher}, torch.eye(C)[:N] if N <= C else torch.randn(N, C)))
    assert torch.equal(batch.entry, images[picked]) and torch.equal(batch.targets[0], teacher[picked])
    assert batch.labels is not None and len(batch.labels) == 3


def test_r2kd_in_value_and_rank():
    teacher = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, C))
    given = facts(student_shapes=[(C,)], teacher=teacher)
    own = RobustnessReinforced(R2KD(pruned=0.5, softness=0.05), given)
    images, (student, answer, _) = torch.randn(N, 3, 2, 2), logits()
    weight = teacher[1].weight.detach().numpy().copy()
    weight[np.abs(weight) < np.median(np.abs(weight))] = 0
    second = images.flatten(1).numpy() @ weight.T + teacher[1].bias.detach().numpy()
    p, q = softmax((0.7 * answer.numpy() + 0.3 * second) / 4), softmax(student.detach().numpy() / 4)

    def distance(a, b):
        return 1 - (np.abs((a * b).sum(1)) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))).mean()

    ranks = [(1 / (1 + np.exp(-(x[:, :, None] - x[:, None, :]) / 0.05))).sum(2) for x in (q, p)]
    expected = 2 * 16 * (distance(q, p) + distance(q.T, p.T)) + 2 * (1 - pearson(*ranks).mean())
    loss = own(StepBatch(images, {0: answer}, None, images=images), {0: student}, None)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    torch.autograd.gradcheck(lambda s: own(StepBatch(images, {0: answer}, None, images=images), {0: s}, None), student)


def test_soft_ranks_come_to_ranks():
    """And their correlation to Spearman's."""
    a, b = torch.rand(N, C), torch.rand(N, C)
    ranks = [x.argsort(1).argsort(1).double() for x in (a, b)]
    torch.testing.assert_close(
        correlation(soft_ranks(a, 1e-6), soft_ranks(b, 1e-6)), correlation(*ranks), rtol=1e-6, atol=1e-7
    )


def test_pruning_takes_the_smallest_weights_of_a_copy():
    network = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.Linear(4, 5)).to(memory_format=torch.channels_last)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    less = pruned(network, 0.3)
    for own, whole in zip(less, network):
        gone = own.weight == 0
        assert gone.sum() == round(0.3 * own.weight.numel())
        assert whole.weight[gone].abs().max() <= whole.weight[~gone].abs().min()
    assert less.state_dict().keys() == before.keys()
    assert all(torch.equal(network.state_dict()[name], value) for name, value in before.items())


def test_review_fuses_from_the_last_cut_to_the_first():
    own = Review(ReviewKD(), facts()).eval()
    student = [torch.randn(N, 3, 4, 4), torch.randn(N, 4, 2, 2)]
    teacher = [torch.randn(N, 5, 4, 4), torch.randn(N, 6, 2, 2)]
    last = own.fusions[1].narrow(student[1])
    first = own.fusions[0].narrow(student[0])
    upper = last.repeat_interleave(2, 2).repeat_interleave(2, 3)
    weights = own.fusions[0].attention(torch.cat([first, upper], 1))
    joined = first * weights[:, :1] + upper * weights[:, 1:]
    expected = pyramid_distance(own.fusions[1].widen(last), teacher[1])
    expected = expected + pyramid_distance(own.fusions[0].widen(joined), teacher[0])
    loss = own(StepBatch(student[0], dict(enumerate(teacher)), None), dict(enumerate(student)), None)
    torch.testing.assert_close(loss, expected)


def test_the_pyramid_weighs_coarse_maps_less():
    a, b = torch.randn(N, 2, 4, 4), torch.randn(N, 2, 4, 4)
    x, y = as_numpy(a, b)

    def mse(size):
        pooled = [v.reshape(N, 2, size, 4 // size, size, 4 // size).mean((3, 5)) for v in (x, y)]
        return ((pooled[0] - pooled[1]) ** 2).mean()

    expected = (mse(4) + mse(2) / 2 + mse(1) / 4) / 1.75
    assert pyramid_distance(a, b).item() == pytest.approx(expected)
