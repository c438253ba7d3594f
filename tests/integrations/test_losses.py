"""Every loss against the formula that people write with torch's own modules, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stablekd_fast.errors import ConfigError, StableKDError
from stablekd_fast.losses import ContrastiveLoss, CosineLoss, DKDLoss, KDLoss, KLDivWithLogitsLoss, MSELoss

generator = torch.Generator().manual_seed(0)
STUDENT, TEACHER = (3 * torch.randn(6, 5, generator=generator, dtype=torch.float64) for _ in range(2))
LABELS = torch.randint(5, (6,), generator=generator)
FEATURES = [torch.randn(6, 4, 3, 3, generator=generator, dtype=torch.float64) for _ in range(2)]


def kl(reduction, temperature):
    def plain(student, teacher):
        log_q, p = F.log_softmax(student / temperature, 1), F.softmax(teacher / temperature, 1)
        return F.kl_div(log_q, p, reduction=reduction) * temperature**2

    return plain


def hinton(alpha, beta, labels, smoothing=0.0):
    def plain(student, teacher):
        return alpha * kl("batchmean", 3)(student, teacher) + beta * F.cross_entropy(
            student, labels, label_smoothing=smoothing
        )

    return plain


def decoupled(student, teacher):
    own = F.one_hot(LABELS, 5).bool()
    q, p = F.softmax(student / 4, 1), F.softmax(teacher / 4, 1)
    q, p = (torch.stack([x[own], 1 - x[own]], 1) for x in (q, p))
    others = [x[~own].view(6, 4) / 4 for x in (student, teacher)]
    rest = F.kl_div(F.log_softmax(others[0], 1), F.softmax(others[1], 1), reduction="batchmean")
    return 16 * (F.kl_div(q.log(), p, reduction="batchmean") + 8 * rest)


MIXED = F.one_hot(LABELS, 5) * 0.7 + F.one_hot(LABELS.flip(0), 5) * 0.3
LOGIT_CASES = {
    "kl batchmean": (KLDivWithLogitsLoss(temperature=2.0), (), kl("batchmean", 2)),
    "kl mean": (KLDivWithLogitsLoss("mean"), (), kl("mean", 1)),
    "kl sum": (KLDivWithLogitsLoss("sum", 3.0), (), kl("sum", 3)),
    "kd": (KDLoss(3.0, 0.7), (LABELS,), hinton(0.7, 0.3, LABELS)),
    "kd, free weights": (KDLoss(3.0, 2.0, 0.5, label_smoothing=0.1), (LABELS,), hinton(2.0, 0.5, LABELS, 0.1)),
    "kd, mixed labels": (KDLoss(3.0, 0.7), (MIXED,), hinton(0.7, 0.3, MIXED)),
    "kd, no labels": (KDLoss(3.0, 0.7), (), hinton(0.7, 0.0, LABELS)),
    "dkd": (DKDLoss(), (LABELS,), decoupled),
}


def assert_same(ours, plain, student, teacher):
    """Value and gradient."""
    found = []
    for loss in (ours, plain):
        leaf = student.clone().requires_grad_()
        value = loss(leaf, teacher)
        found.append((value, *torch.autograd.grad(value, leaf)))
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-13)


@pytest.mark.filterwarnings("ignore:reduction:UserWarning")
@pytest.mark.parametrize("name", LOGIT_CASES)
def test_losses_of_logits(name):
    loss, others, plain = LOGIT_CASES[name]
    assert_same(lambda student, teacher: loss(student, teacher, *others), plain, STUDENT, TEACHER)


@pytest.mark.parametrize(
    ("loss", "plain"),
    [
        (MSELoss(), nn.MSELoss()),
        (MSELoss("sum"), nn.MSELoss(reduction="sum")),
        (MSELoss(normalize="power"), lambda s, t: F.mse_loss(s, t) / t.square().mean()),
        (CosineLoss(), lambda s, t: (1 - F.cosine_similarity(s, t)).mean()),
        (CosineLoss("sample"), lambda s, t: (1 - F.cosine_similarity(s.flatten(1), t.flatten(1))).mean()),
    ],
    ids=lambda loss: str(loss) if isinstance(loss, nn.Module) else "by hand",
)
def test_losses_of_features(loss, plain):
    assert_same(loss, plain, *FEATURES)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: KLDivWithLogitsLoss("none"), "'none' was given; this loss has batchmean, mean, sum"),
        (lambda: MSELoss("batchmean"), "this loss has mean, sum"),
        (lambda: MSELoss("sum", "power"), "normalised errors are means"),
        (lambda: KDLoss(0.0), "greater than 0"),
        (lambda: KDLoss(alpha=1.5), "must not be negative"),
        (lambda: MSELoss()(FEATURES[0], FEATURES[1][:1]), "one shape"),
        (lambda: ContrastiveLoss(5, queue=-1), "queue >= 0"),
        (lambda: ContrastiveLoss(5, temperature=0), "greater than 0"),
        (
            lambda: ContrastiveLoss(7)(STUDENT, TEACHER),
            r"\[6, 5\] and \[6, 5\]; it needs embeddings \[N, 7\] twice",
        ),
        (lambda: ContrastiveLoss(5)(STUDENT[:, :3], TEACHER), "A student of another width needs a linear map to 5"),
        (lambda: KDLoss()(STUDENT.float(), TEACHER.float(), torch.full((6,), -100)), r"labels\[0\] is -100"),
    ],
)
def test_what_is_not_supported_is_refused(make, words):
    with pytest.raises(StableKDError, match=words):
        make()


def test_a_contrast_is_the_cross_entropy_of_cosines_with_the_batch_and_with_earlier_embeddings():
    loss, earlier = ContrastiveLoss(5, temperature=0.1, queue=9).double(), torch.zeros(0, 5).double()
    for _ in range(3):  # of 18 embeddings the queue has the last 9

        def plain(student, teacher, earlier=earlier):
            others = torch.cat([teacher, earlier])
            cosines = F.cosine_similarity(student[:, None], others[None], dim=2)
            return F.cross_entropy(cosines / 0.1, torch.arange(6))

        assert_same(loss.eval(), plain, STUDENT, TEACHER)  # which reads the queue, and leaves it
        assert_same(loss.eval(), plain, STUDENT, TEACHER)
        loss.train()(STUDENT, TEACHER)
        earlier = torch.cat([earlier, TEACHER])[-9:]


def test_a_contrast_asks_no_gradient_of_the_teacher_and_takes_half_precision():
    student, teacher = STUDENT.bfloat16().requires_grad_(), TEACHER.bfloat16().requires_grad_()
    loss = ContrastiveLoss(5)(student, teacher)
    loss.backward()
    assert loss.dtype == torch.float32 and student.grad.abs().sum() > 0 and teacher.grad is None


def test_a_contrast_goes_on_from_its_saved_memory():
    first, second = ContrastiveLoss(5, queue=9), ContrastiveLoss(5, queue=9)
    first(STUDENT.float(), TEACHER.float())
    second.load_state_dict(first.state_dict())
    values = [loss.eval()(STUDENT.float(), TEACHER.float()) for loss in (first, second, ContrastiveLoss(5, queue=9))]
    assert values[0] == values[1] != values[2]


def test_bf16_logits_give_a_float32_loss():
    assert KDLoss()(STUDENT.bfloat16(), TEACHER.bfloat16(), LABELS).dtype == torch.float32


def test_errors_of_settings_are_config_errors():
    with pytest.raises(ConfigError):
        DKDLoss(temperature=-1)
