"""Cases of the fused losses: forward and gradient together, against eager and compiled autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stablekd_fast import kernels
from stablekd_fast.bench.core import Case, Contender
from stablekd_fast.bench.floor import FLOOR, floor_contenders
from stablekd_fast.bench.operators import rivals

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""The largest error of loss and gradient, each over its largest magnitude, by dtype.

Autograd that stays in bfloat16 rounds every intermediate result, and errs up to about 1e-2.
"""


@dataclass(frozen=True)
class Setting:
    """Where cases run, whether rivals are also compiled, and whether a few small cases are enough."""

    device: str = "cpu"
    compile: bool = True
    quick: bool = False


@dataclass(frozen=True)
class Loss:
    """A loss to be timed: operator `op`, called with (student, *arguments, **options), against `plain`.

    `plain` takes (student, *operands), and is differentiated by autograd.
    """

    op: str
    name: str
    student: Tensor
    arguments: tuple[Tensor, ...]
    plain: Callable[..., Tensor]
    operands: tuple[Tensor, ...]
    options: dict = field(default_factory=dict)

    @property
    def bytes_read(self) -> int:
        return sum(tensor.nbytes for tensor in (self.student, *self.operands))

    @property
    def bytes_written(self) -> int:
        return self.student.nbytes


def kd_loss_cases(setting: Setting) -> Iterator[Case]:
    shapes = [(128, 100, torch.float32), (128, 1000, torch.float32)]
    if not setting.quick:
        shapes += [(16384, 1000, torch.float32), (16384, 1000, torch.bfloat16)]
    options = {"temperature": rivals.TEMPERATURE, "alpha": rivals.ALPHA}
    for samples, classes, dtype in shapes:
        yield loss_case(_logits_loss("kd_loss", rivals.kd_loss, options, samples, classes, dtype, setting), setting)


def decoupled_kl_cases(setting: Setting) -> Iterator[Case]:
    alpha, beta = rivals.DECOUPLED_ALPHA, rivals.DECOUPLED_BETA
    options = {"temperature": rivals.TEMPERATURE, "alpha": alpha, "beta": beta}
    samples = 128 if setting.quick else 16384
    loss = _logits_loss("decoupled_kl", rivals.decoupled_kl, options, samples, 1000, torch.float32, setting)
    yield loss_case(loss, setting)


def grouped_kl_cases(setting: Setting) -> Iterator[Case]:
    """Rows whose groups hang on a rounding are left out: a class more or less is no small error."""
    samples, classes = (128 if setting.quick else 16384), 1000
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(samples + samples // 8, classes, generator=generator) for _ in range(2))
    p = torch.softmax(teacher.double() / rivals.TEMPERATURE, 1).sort(1, descending=True).values.cumsum(1)
    clear = (p - rivals.THRESHOLD).abs().amin(1) > 3e-6
    student, teacher = (x[clear][:samples].to(setting.device) for x in (student, teacher))
    options = {"temperature": rivals.TEMPERATURE, "threshold": rivals.THRESHOLD}
    name = f"{samples}x{classes} float32"
    yield loss_case(Loss("grouped_kl", name, student, (teacher,), rivals.grouped_kl, (teacher,), options), setting)


def correlation_cases(setting: Setting) -> Iterator[Case]:
    for samples, classes in ((128, 10), (128 if setting.quick else 16384, 1000)):
        generator = torch.Generator().manual_seed(0)
        student, teacher = (
            (3 * torch.randn(samples, classes, generator=generator)).to(setting.device) for _ in range(2)
        )
        name = f"{samples}x{classes} float32"
        yield loss_case(Loss("correlation", name, student, (teacher,), rivals.correlation, (teacher,)), setting)


def standardised_kd_loss_cases(setting: Setting) -> Iterator[Case]:
    options = {"temperature": rivals.TEMPERATURE, "kl_weight": rivals.STANDARDISED_WEIGHT}
    for samples, classes in ((128, 10), (128 if setting.quick else 16384, 1000)):
        plain = rivals.standardised_kd_loss
        loss = _logits_loss("standardised_kd_loss", plain, options, samples, classes, torch.float32, setting)
        yield loss_case(loss, setting)


def loss_case(loss: Loss, setting: Setting, extra: tuple[Contender, ...] = ()) -> Case:
    """Set `eager`, `compiled`, `stablekd` (loss and gradient at once) and `stablekd-autograd` against the floor."""
    op, fused = getattr(kernels, loss.op), getattr(kernels, f"{loss.op}_with_grad")
    contenders = [Contender("eager", _by_autograd(loss.plain, loss))]
    if loss.student.dtype != torch.float32:
        contenders.append(Contender("eager", _by_autograd(_in_float32(loss.plain), loss), "in float32"))
    if setting.compile:
        contenders += _compiled(loss)
    ours = (loss.student, *loss.arguments)
    differentiated = _by_autograd(lambda leaf, *_: op(leaf, *loss.arguments, **loss.options), loss)
    contenders += [
        Contender("stablekd", lambda: fused(*ours, **loss.options), role="ours"),
        Contender("stablekd-autograd", differentiated, role="ours"),
        *extra,
        *floor_contenders(loss.bytes_read, loss.bytes_written, setting.device, (loss.student, *loss.operands)),
    ]
    return Case(
        "kernels",
        f"{loss.op} {loss.name}",
        contenders,
        "eager",
        lambda: _in_float64(loss),
        TOLERANCE[loss.student.dtype],
        {"bytes": loss.bytes_read + loss.bytes_written},
        FLOOR,
    )


def random_features(
    shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format, device: str, seed: int
) -> Tensor:
    """Draw features as networks make them: channels of different mean and spread."""
    generator = torch.Generator().manual_seed(seed)
    per_channel = (1, shape[1], 1, 1)
    spread, centre = (torch.rand(per_channel, generator=generator) + 0.5 for _ in range(2))
    features = torch.randn(shape, generator=generator) * spread + centre
    return features.to(device, dtype).contiguous(memory_format=layout)


def _logits_loss(
    op: str, plain: Callable, options: dict, samples: int, classes: int, dtype: torch.dtype, setting: Setting
) -> Loss:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        (3 * torch.randn(samples, classes, generator=generator)).to(setting.device, dtype) for _ in range(2)
    )
    labels = torch.randint(classes, (samples,), generator=generator).to(setting.device)
    name = f"{samples}x{classes} {str(dtype).removeprefix('torch.')}"
    return Loss(op, name, student, (teacher, labels), plain, (teacher, labels), options)


def _by_autograd(function: Callable[..., Tensor], loss: Loss) -> Callable[[], tuple[Tensor, Tensor]]:
    leaf = loss.student.detach().requires_grad_()

    def call() -> tuple[Tensor, Tensor]:
        value = function(leaf, *loss.operands)
        return value.detach(), torch.autograd.grad(value, leaf)[0]

    return call


def _compiled(loss: Loss) -> list[Contender]:
    """Return the forward pass compiled and differentiated by autograd, and loss with gradient compiled as one graph."""
    forward = torch.compile(loss.plain, dynamic=False)
    both = torch.compile(torch.func.grad_and_value(loss.plain), dynamic=False)

    def one_graph() -> tuple[Tensor, Tensor]:
        gradient, value = both(loss.student, *loss.operands)
        return value, gradient

    return [
        Contender("compiled", _by_autograd(forward, loss), "autograd"),
        Contender("compiled", one_graph, "one graph"),
    ]


def _in_float32(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *operands: plain(*(_converted(tensor, torch.float32) for tensor in operands))


def _in_float64(loss: Loss) -> tuple[Tensor, Tensor]:
    student = loss.student.double().requires_grad_()
    value = loss.plain(student, *(_converted(tensor, torch.float64) for tensor in loss.operands))
    return value.detach(), torch.autograd.grad(value, student)[0]


def _converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
