"""`stablekd bench own-loop`: StableKD in a plain loop, written by hand, by `Blockwise`, and by it with a kept teacher.

All train the blocks apart, over the same batches, which lie ready. Losses and weights are checked against the loop
written by hand, to 1e-5.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stablekd_fast.bench.core import Case, Contender, Measured, measure_cases, pinned, scratch
from stablekd_fast.bench.runs.alike import (
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
from stablekd_fast.blocks import PairedBlocks, pair_blocks
from stablekd_fast.integrations.blockwise import Blockwise
from stablekd_fast.objectives.kd import LogitKD

FULL, QUICK = Setting(batches=5, steps=5), Setting("resnet20", "resnet20", 8, 8, 2, 3)


def run_own_loop(
    directory: Path, data: str | None, rounds: int, show: Callable[[list[dict]], None], *, quick: bool = False
) -> Measured:
    """Measure the loops. Rows are put into `directory` for the time of the bench; `data` names small images, random
    ones by default."""
    setting = QUICK if quick else FULL
    images = Noise(setting.count, setting.size) if data is None else Pixels(data, setting.count)
    with pinned() as pins, scratch(directory) as folder:
        measured = measure_cases([own_loop_case(setting, images, folder)], rounds, show)
    measured.settings = {"data": data or "random", "quick": quick, **vars(setting), **pins}
    return measured


def own_loop_case(setting: Setting, images: Images, folder: Path) -> Case:
    """Train the blocks apart; the limit is the student's own training, without any teacher."""
    views, batches = ready_batches(setting, images)

    def networks():
        teacher, student = fresh_networks(setting)
        return settled(teacher, batches), student.train()

    def loop(parameters: list, loss_of: Callable[..., Tensor], student: nn.Module) -> Run:
        optimizer = torch.optim.SGD(parameters, lr=setting.lr, momentum=0.9, weight_decay=5e-4)

        def step(images: Tensor, labels: Tensor, keys: dict) -> Tensor:
            loss = loss_of(images, labels, keys)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.detach()

        return Run(setting, student, batches, step, lambda: optimizer.state.clear())

    def by_hand() -> Run:
        teacher, student = networks()
        paired = pair_blocks(teacher, student, batches[0][0])
        return loop(list(student.parameters()), lambda *batch: hand_written_loss(paired, *batch), student)

    def by_module(rows: str | None = None) -> Run:
        teacher, student = networks()
        own = Blockwise(teacher, student, views if rows else batches[0][0], 1, share=1.0, rows=rows)
        own.begin(0)
        return loop(list(own.parameters()), lambda *batch: own(*batch).loss, student)

    def alone() -> Run:
        _, student = networks()
        return loop(
            list(student.parameters()), lambda images, labels, _: F.cross_entropy(student(images), labels), student
        )

    written, limit = by_hand(), alone()
    contenders = [
        Contender("written by hand", written),
        Contender("Blockwise", by_module(), role="ours"),
        Contender("Blockwise, kept teacher", by_module(str(folder / "rows")), role="ours"),
        Contender("student alone", limit, role="limit", expected=limit),
    ]
    per_call = {"images": setting.steps * setting.batch}
    return Case(
        "own-loop", named(setting), contenders, "written by hand", written, STEPS_TOLERANCE, per_call, "student alone"
    )


def hand_written_loss(paired: PairedBlocks, images: Tensor, labels: Tensor, keys: dict | None = None) -> Tensor:
    """Return StableKD's loss of blocks apart by torch's own operations, as one would write it without this package's
    losses."""
    known, settings = paired.teacher_outputs(images), LogitKD()
    *features, logits = paired.student_outputs([[k] for k in range(len(paired))], images, known)
    targets = F.softmax(known[len(features)] / settings.temperature, 1)
    divergence = F.kl_div(F.log_softmax(logits / settings.temperature, 1), targets, reduction="batchmean")
    loss = F.cross_entropy(logits, labels) + settings.kl_weight * settings.temperature**2 * divergence
    for k, feature in enumerate(features):
        loss = loss + F.mse_loss(feature, known[k]) / known[k].square().mean()
    return loss
