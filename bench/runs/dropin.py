"""`stablekd bench dropin`: the objectives of torchdistill and mdistiller with their losses and with ours.

torchdistill is the real package. mdistiller is not on PyPI: its formulas stand in `rivals.py`, and a plain loop in its
place. Losses are checked against float64; runs of fifty steps in float32 against those with the rival's loss, to 1e-5,
losses and weights.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stablekd_fast import kernels
from stablekd_fast.bench.core import Case, Contender, Measured, measure_cases, pinned, scratch
from stablekd_fast.bench.operators import rivals
from stablekd_fast.bench.runs.alike import (
    CLASSES,
    STEPS_TOLERANCE,
    Images,
    Noise,
    Pixels,
    Run,
    Setting,
    fresh_networks,
    named,
    ready_batches,
    settled,
)
from stablekd_fast.bench.runs.loops import LOGITS, torchdistill_box
from stablekd_fast.integrations.torchdistill import FastKDLoss, SharedBlocks

LOSS_TOLERANCE = 1e-5
OBJECTIVE = {"temperature": 4.0, "alpha": 0.9}
"""The settings of torchdistill's sample config for CIFAR-10."""

WEIGHTS = {"mdistiller KD": (0.1, 0.9), "mdistiller DKD": (1.0, 1 / 20)}
"""The weights of cross entropy and divergence in mdistiller's configs; DKD's is of the first epoch of its warm-up."""

Term = Callable[[Tensor, Tensor, Tensor], Tensor]


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


def torchdistill_case(setting: Setting, images: Images, folder: Path) -> Case:
    """Train torchdistill's sample objective in its own box: with its loss, with ours, and with ours and a kept teacher.

    The logits of a kept teacher come from rows on disk.
    """
    views, batches = ready_batches(setting, images)
    wrapper = {
        "key": "StableKDTeacher",
        "kwargs": {"shared": SharedBlocks(views=views, directory=str(folder / "dropin"))},
    }
    kept = {"forward_proc": "forward_batch_supp_dict", "auxiliary_model_wrapper": wrapper}

    def run(key: str, teacher_settings: dict | None = None) -> Run:
        teacher, student = fresh_networks(setting)
        settled(teacher, batches)
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
    return Case("dropin", f"torchdistill, {named(setting)}", contenders, "theirs", theirs, STEPS_TOLERANCE)


def mdistiller_cases(setting: Setting, images: Images) -> Iterator[Case]:
    """Train cross entropy and the formula in a plain loop."""
    _, batches = ready_batches(setting, images)
    for name, weights in WEIGHTS.items():
        theirs, ours = (_plain_run(setting, batches, term, weights) for term in _terms()[name])
        contenders = [Contender("theirs", theirs), Contender("stablekd", ours, role="ours")]
        yield Case("dropin", f"{name}, {named(setting)}", contenders, "theirs", theirs, STEPS_TOLERANCE)


def _plain_run(setting: Setting, batches: list, term: Term, weights: tuple[float, float]) -> Run:
    teacher, student = fresh_networks(setting)
    settled(teacher, batches)
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
