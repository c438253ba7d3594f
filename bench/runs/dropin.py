"""`stablekd bench dropin`: the objectives of torchdistill and mdistiller with their losses and with ours.

torchdistill is the real package. mdistiller is not on PyPI: its formulas stand in `rivals.py`, and a plain loop in its
place. Losses are checked against float64; runs of fifty steps in float32 against those with the rival's loss, to 1e-5,
losses and weights.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from stablekd_fast import kernels, models
from stablekd_fast.bench.core import Case, Contender, Measured, measure_cases, pinned, scratch
from stablekd_fast.bench.operators import rivals
from stablekd_fast.bench.runs.loops import LOGITS, torchdistill_box
from stablekd_fast.data import open_dataset
from stablekd_fast.errors import DataError
from stablekd_fast.integrations.torchdistill import FastKDLoss, SampleViews, SharedBlocks
from stablekd_fast.models.weights import restore_state

LOSS_TOLERANCE = 1e-5
STEPS_TOLERANCE = 1e-5
STEPS = 50
CLASSES = 100
OBJECTIVE = {"temperature": 4.0, "alpha": 0.9}
"""The settings of torchdistill's sample config for CIFAR-10."""

WEIGHTS = {"mdistiller KD": (0.1, 0.9), "mdistiller DKD": (1.0, 1 / 20)}
"""The weights of cross entropy and divergence in mdistiller's configs; DKD's is of the first epoch of its warm-up."""

Term = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Setting:
    """The networks of the runs, and how long they are."""

    teacher: str = "resnet56"
    student: str = "resnet20"
    size: int = 32
    batch: int = 64
    batches: int = 10
    steps: int = STEPS
    lr: float = 1e-4
    """A low rate: at a usual one, networks of this depth amplify roundings beyond 1e-5 within fifty steps."""

    @property
    def count(self) -> int:
        """The number of images."""
        return self.batches * self.batch


QUICK = Setting("resnet20", "resnet20", 8, 8, 2, 3)


def run_dropin(
    directory: Path, data: str | None, rounds: int, show: Callable[[list[dict]], None], *, quick: bool = False
) -> Measured:
    """Measure losses and whole objectives.

    The teacher's rows are put into `directory` for the time of the bench. `data` names small images; random ones are
    made by default.
    """
    setting = QUICK if quick else Setting()
    images = Noise(setting.count, setting.size) if data is None else Pixels(data, setting.count)
    with pinned() as pins, scratch(directory) as folder:
        logging.disable(logging.INFO)
        try:
            cases = [
                *loss_cases(setting),
                torchdistill_case(setting, images, folder),
                *mdistiller_cases(setting, images),
            ]
            measured = measure_cases(cases, rounds, show)
        finally:
            logging.disable(logging.NOTSET)
    measured.settings = {"data": data or "random", "quick": quick, **vars(setting), **pins}
    return measured


def loss_cases(setting: Setting) -> Iterator[Case]:
    """Time the forward and backward pass of each loss."""
    for samples, classes in ((setting.batch, 10), (setting.batch, CLASSES), (2 * setting.batch, 1000)):
        for name, (theirs, ours) in _terms().items():
            yield _loss_case(f"{name}, {samples}x{classes}", theirs, ours, samples, classes)


def _terms() -> dict[str, tuple[Term, Term]]:
    """Return the rival's loss and ours, as functions of the student's logits, the teacher's logits and labels."""
    from torchdistill.losses.mid_level import KDLoss

    def in_box(loss: nn.Module) -> Term:
        return lambda student, teacher, labels: loss({".": {"output": student}}, {".": {"output": teacher}}, labels)

    temperature, alpha, beta = rivals.TEMPERATURE, rivals.DECOUPLED_ALPHA, rivals.DECOUPLED_BETA
    return {
        "torchdistill KDLoss": (in_box(KDLoss(**LOGITS, **OBJECTIVE)), in_box(FastKDLoss(**LOGITS, **OBJECTIVE))),
        "mdistiller KD": (
            lambda student, teacher, labels: rivals.kd_term(student, teacher),
            lambda student, teacher, labels: kernels.kd_loss(student, teacher, temperature=temperature),
        ),
        "mdistiller DKD": (
            rivals.dkd_term,
            lambda *operands: kernels.decoupled_kl(*operands, temperature=temperature, alpha=alpha, beta=beta),
        ),
    }


def _loss_case(name: str, theirs: Term, ours: Term, samples: int, classes: int) -> Case:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(samples, classes, generator=generator) for _ in range(2))
    labels = torch.randint(classes, (samples,), generator=generator)

    def both_passes(term: Term, dtype: torch.dtype = torch.float32) -> Callable[[], tuple[Tensor, Tensor]]:
        leaf, target = student.to(dtype).requires_grad_(), teacher.to(dtype)

        def call() -> tuple[Tensor, Tensor]:
            value = term(leaf, target, labels)
            return value.detach(), torch.autograd.grad(value, leaf)[0]

        return call

    contenders = [Contender("theirs", both_passes(theirs)), Contender("stablekd", both_passes(ours), role="ours")]
    return Case("dropin", name, contenders, "theirs", both_passes(theirs, torch.float64), LOSS_TOLERANCE)


class Noise:
    """Random images as a torchvision data set holds them."""

    transform = None

    def __init__(self, count: int, size: int) -> None:
        draw = np.random.default_rng(0).integers
        self.data, self.targets = draw(0, 256, (count, size, size, 3), dtype=np.uint8), draw(0, CLASSES, count).tolist()


class Pixels:
    """Images of a data set as a torchvision data set holds them. Raises DataError if they do not lie in memory."""

    transform = None

    def __init__(self, data: str, count: int) -> None:
        split = open_dataset(data).train
        if not split.resident:
            raise DataError(f"{data} has images of many sizes; give small ones of one size, e.g. CIFAR-10.")
        chosen = split.subset(count, 0)
        self.data, self.targets = chosen.images.numpy(), chosen.labels.tolist()


Images = Noise | Pixels


class Run:
    """Trains some steps from the same weights over the same batches; gives the losses, and all weights in one row."""

    def __init__(
        self,
        setting: Setting,
        student: nn.Module,
        batches: list,
        step: Callable[..., Tensor],
        restart: Callable[[], None],
    ) -> None:
        self.steps, self.student, self.batches = setting.steps, student, batches
        self.step, self.restart, self.start = step, restart, copy.deepcopy(student.state_dict())

    def __call__(self) -> tuple[Tensor, Tensor]:
        restore_state(self.student, self.start)
        self.restart()
        losses = [self.step(*self.batches[turn % len(self.batches)]) for turn in range(self.steps)]
        return torch.stack(losses), torch.cat([parameter.detach().flatten() for parameter in self.student.parameters()])


def _networks(setting: Setting) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    teacher, student = (models.build(name, CLASSES, setting.size) for name in (setting.teacher, setting.student))
    return teacher, student


def _batches(setting: Setting, images: Images) -> tuple[SampleViews, list]:
    views = SampleViews(images, views=1, batch_size=setting.batch, mean=(0.5,) * 3, std=(0.25,) * 3)
    views.set_epoch(0)
    return views, list(DataLoader(views, batch_size=setting.batch))


def _settle(teacher: nn.Module, batches: list) -> nn.Module:
    """Give the teacher batch-norm statistics of the data, without which activations fade."""
    with torch.no_grad():
        for images, *_ in batches:
            teacher.train()(images)
    return teacher.eval()


def torchdistill_case(setting: Setting, images: Images, folder: Path) -> Case:
    """Train torchdistill's sample objective in its own box: with its loss, with ours, and with ours and a kept teacher.

    The logits of a kept teacher come from rows on disk.
    """
    views, batches = _batches(setting, images)
    wrapper = {
        "key": "StableKDTeacher",
        "kwargs": {"shared": SharedBlocks(views=views, directory=str(folder / "dropin"))},
    }
    kept = {"forward_proc": "forward_batch_supp_dict", "auxiliary_model_wrapper": wrapper}

    def run(key: str, teacher_settings: dict | None = None) -> Run:
        teacher, student = _networks(setting)
        _settle(teacher, batches)
        kd = {"key": key, "kwargs": OBJECTIVE}
        box = torchdistill_box(teacher, student, kd, lr=setting.lr, teacher_settings=teacher_settings)

        def step(images: Tensor, labels: Tensor, keys: dict) -> Tensor:
            loss = box.forward_process(images, labels, keys)
            box.post_forward_process(loss)
            return loss.detach()

        return Run(setting, student, batches, step, lambda: box.optimizer.state.clear())

    theirs = run("KDLoss")
    contenders = [
        Contender("theirs", theirs),
        Contender("stablekd", run("FastKDLoss"), role="ours"),
        Contender("stablekd, kept teacher", run("FastKDLoss", kept), role="ours"),
    ]
    return Case("dropin", f"torchdistill, {_named(setting)}", contenders, "theirs", theirs, STEPS_TOLERANCE)


def mdistiller_cases(setting: Setting, images: Images) -> Iterator[Case]:
    """Train cross entropy and the formula in a plain loop."""
    _, batches = _batches(setting, images)
    for name, weights in WEIGHTS.items():
        theirs, ours = (_plain_run(setting, batches, term, weights) for term in _terms()[name])
        contenders = [Contender("theirs", theirs), Contender("stablekd", ours, role="ours")]
        yield Case("dropin", f"{name}, {_named(setting)}", contenders, "theirs", theirs, STEPS_TOLERANCE)


def _plain_run(setting: Setting, batches: list, term: Term, weights: tuple[float, float]) -> Run:
    teacher, student = _networks(setting)
    _settle(teacher, batches)
    student.train()
    optimizer = torch.optim.SGD(student.parameters(), lr=setting.lr, momentum=0.9, weight_decay=5e-4)

    def step(images: Tensor, labels: Tensor, keys: dict) -> Tensor:
        output = student(images)
        with torch.no_grad():
            target = teacher(images)
        loss = weights[0] * F.cross_entropy(output, labels) + weights[1] * term(output, target, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return Run(setting, student, batches, step, lambda: optimizer.state.clear())


def _named(setting: Setting) -> str:
    return (
        f"{setting.steps} steps, {setting.teacher} to {setting.student}, {setting.size} px, batches of {setting.batch}"
    )
