"""float16 students: the gradient of a mean over a large map is smaller than float16 can hold, so losses scale it before
they round it. Compared with float32 at the sizes of training."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from stablekd_fast import kernels, losses
from stablekd_fast.blocks import pair_blocks
from stablekd_fast.data import Batch
from stablekd_fast.engine.inputs import StageInputs, load_batch
from stablekd_fast.engine.schedule import Optimizer
from stablekd_fast.engine.step import GroupStep, Rates
from stablekd_fast.execution.precision import FP32, Precision
from stablekd_fast.objectives import Objectives, objective
from stablekd_fast.objectives.registry import register
from stablekd_fast.teacher.live import Relay

CPU = torch.device("cpu")
SCALE = 2.0**16
"""The first loss scale."""
LOST, APART, ALONG = 1e-3, 0.01, 0.9999
"""The largest share of elements that float16 may lose, the largest relative error, the least cosine."""


def compare(half: Tensor, exact: Tensor) -> tuple[float, float, float]:
    """Share of elements that are zero in `half` alone, relative error, cosine. Both carry the same scale."""
    half, exact = half.double().flatten(), exact.double().flatten()
    lost = ((half == 0) & (exact != 0)).double().mean().item()
    return lost, ((half - exact).norm() / exact.norm()).item(), (half @ exact / half.norm() / exact.norm()).item()


def assert_kept(half: Tensor, exact: Tensor) -> None:
    lost, apart, cosine = compare(half, exact)
    assert lost < LOST and apart < APART and cosine > ALONG, (lost, apart, cosine)


def features(*shape: int) -> tuple[Tensor, Tensor]:
    """Activations behind a ReLU, and a student's that come near them: what training compares."""
    made = torch.Generator().manual_seed(3)
    target = torch.randn(shape, generator=made).clamp_(min=0)
    student = target + 0.3 * torch.randn(shape, generator=made)
    return tuple(x.half().contiguous(memory_format=torch.channels_last) for x in (student, target))


def logits() -> tuple[Tensor, Tensor, Tensor]:
    made = torch.Generator().manual_seed(4)
    teacher = 2 * torch.randn(256, 1000, generator=made)  # no probability is too small for float16 by itself
    student = teacher + torch.randn(256, 1000, generator=made)
    return student.half(), teacher.half(), torch.randint(0, 1000, (256,), generator=made)


# In a step.


class Wide(nn.Sequential):
    """A block of one convolution whose activation has the size of a ResNet's first stage, and a head."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        super().__init__(nn.Conv2d(3, 64, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def gradient_in_a_step(precision: Precision, shape: tuple[int, int], micro_batches: int = 1) -> tuple[Tensor, Tensor]:
    """The gradient that backward starts from at the cut, for all micro-batches, and the loss that is reported."""
    count, side = shape
    made = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, side, side, generator=made).contiguous(memory_format=torch.channels_last)
    batch = Batch(torch.arange(count), 0, images, torch.randint(0, 10, (count,), generator=made))
    teacher, student = Wide(1), Wide(2)
    paired = pair_blocks(teacher.eval(), student, images[:2], ["0"])
    paired.precision = precision
    aims = Objectives(objective("feature", "mse"), objective("logits", "kd"), "all")
    step = GroupStep(
        paired,
        [0],
        aims,
        Optimizer("sgd"),
        StageInputs(CPU),
        rates=Rates.constant(0.0),
        micro_batches=micro_batches,
    )
    load_batch(step.inputs, Relay(paired), {0}, batch)
    seen: list[Tensor] = []
    step.blocks[0].register_full_backward_hook(lambda module, inputs, outputs: seen.append(outputs[0].detach().clone()))
    step.run()
    return torch.cat(seen), step.losses[0]


@pytest.mark.parametrize("shape, micro_batches", [((64, 56), 1), ((8, 56), 2), ((6, 28), 3)])
def test_a_step_s_gradients_survive_float16(one_thread, shape, micro_batches):
    """64 x 64 x 56 x 56 is the first stage of a ResNet at 224 pixels with a batch of 64."""
    half, reported = gradient_in_a_step(Precision("fp16"), shape, micro_batches)
    exact, expected = gradient_in_a_step(FP32, shape, micro_batches)
    assert half.dtype == torch.float16
    assert_kept(half, exact * SCALE)
    assert reported.item() == pytest.approx(expected.item(), rel=5e-3), "the loss is reported without the scale"


# By name.


@pytest.mark.parametrize("normalize", ["power", "channel", "l2", None])
def test_feature_objectives_scale_before_they_round(normalize):
    student, target = features(16, 64, 56, 56)
    aim = objective("feature", "mse", {"normalize": normalize})
    loss, half = aim(student, target, 1, None, torch.tensor(SCALE))
    expected, exact = aim(student.float(), target, 1)
    assert_kept(half, exact * SCALE)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("given", ["teacher", "labels", "teacher and labels", "teacher and mixed labels"])
def test_logit_objectives_scale_before_they_round(given):
    student, teacher, labels = logits()
    mixed = 0.7 * nn.functional.one_hot(labels, 1000).float() + 0.0003
    taken = mixed if "mixed" in given else labels if "labels" in given else None
    aim = objective("logits", "kd")
    operands = teacher if "teacher" in given else None, taken
    with Precision("fp16").applied(CPU):
        loss, half = aim(student, *operands, torch.tensor(SCALE))
    expected, exact = aim(student.float(), *operands)
    assert half.dtype == torch.float16
    assert_kept(half, exact * SCALE)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)


@dataclass(frozen=True)
class Nothing:
    """No options."""


def test_an_objective_that_knows_nothing_of_scales_is_scaled_behind_it():
    """2^16 is infinite in float16."""

    @register("feature", "of a user", Nothing)
    def function(config, student, target, channel_axis):
        return (student - target).float().square().mean(), torch.full_like(student, 2.0**-10)

    student, target = torch.ones(4, dtype=torch.float16), torch.zeros(4, dtype=torch.float16)
    loss, gradient = objective("feature", "of a user")(student, target, 1, None, torch.tensor(SCALE))
    assert loss.item() == 1.0 and gradient.dtype == torch.float16 and gradient.tolist() == [64.0] * 4


# In loops of others, where a GradScaler multiplies the loss.

MODULES = {
    "MSELoss": losses.MSELoss(),
    "MSELoss, power": losses.MSELoss(normalize="power"),
    "MSELoss, channel": losses.MSELoss(normalize="channel"),
    "MSELoss, l2": losses.MSELoss(normalize="l2"),
    "CosineLoss, position": losses.CosineLoss(),
    "CosineLoss, sample": losses.CosineLoss(per="sample"),
    "attention_transfer": kernels.attention_transfer,
    "KLDivWithLogitsLoss": losses.KLDivWithLogitsLoss(temperature=4.0),
    "KLDivWithLogitsLoss, mean": losses.KLDivWithLogitsLoss("mean", temperature=4.0),
    "KDLoss": losses.KDLoss(),
    "DKDLoss": losses.DKDLoss(),
}


def by_autograd(loss, scale: float, student: Tensor, *others: Tensor) -> Tensor:
    leaf = student.detach().clone().requires_grad_()
    (loss(leaf, *others) * scale).backward()
    assert leaf.grad is not None and leaf.grad.dtype == leaf.dtype
    return leaf.grad


@pytest.mark.parametrize("name", MODULES)
def test_losses_under_a_scaler_keep_what_float16_can_hold(name):
    loss = MODULES[name]
    if "KL" in name or "KD" in name:
        student, teacher, labels = logits()
        others = (teacher, labels) if name in ("KDLoss", "DKDLoss") else (teacher,)
    else:
        student, teacher = features(16, 64, 56, 56)
        others = (teacher,)
    scale = SCALE * (1000 if name == "attention_transfer" else 1)  # its usual weight
    assert_kept(by_autograd(loss, scale, student, *others), by_autograd(loss, scale, student.float(), *others))


def test_a_gradient_that_float16_cannot_hold_is_infinite_so_that_the_scaler_skips():
    student, target = torch.full((2, 4, 3, 3), 60.0).half(), torch.zeros(2, 4, 3, 3).half()
    assert by_autograd(losses.MSELoss(), 2.0**24, student, target).isinf().all()
    loss, gradient = objective("feature", "mse", {"normalize": None})(student, target, 1, None, torch.tensor(2.0**24))
    assert loss.item() == 3600.0 and gradient.isinf().all()
