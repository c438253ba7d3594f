"""What happens at a merge, measured: exposure gap, continuity of the composed student, recovery of the loss."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from stablekd_fast.blocks import PairedBlocks, evaluation_mode
from stablekd_fast.blocks.modes import untouched
from stablekd_fast.data import Batch
from stablekd_fast.engine.step import IMAGES, GroupStep, StageInputs, load_batch
from stablekd_fast.teacher.live import Teacher

WINDOW = 10
"""Training losses are averaged over this many steps before they are compared with the loss at the merge."""


@contextlib.contextmanager
def other_inputs(steps: list[GroupStep]) -> Iterator[StageInputs]:
    """The steps read from these inputs within: a process that trains on its part of each batch measures on whole
    ones."""
    own, other = steps[0].inputs, StageInputs(steps[0].device)
    try:
        for step in steps:
            step.inputs = other
        yield other
    finally:
        for step in steps:
            step.inputs = own


def exposure_gap(
    paired: PairedBlocks,
    teacher: Teacher,
    steps: list[GroupStep],
    batches: Iterable[Batch],
) -> dict[str, float]:
    """Loss at each group's end fed by the student itself, divided by the loss fed by the teacher.

    1 means that a group does as well on what the student really hands over. Batch norm uses batch statistics.
    The first group is left out: the images feed it either way.
    """
    fed_by_student, fed_by_teacher = ([0.0] * len(steps) for _ in range(2))
    with untouched(paired.student), other_inputs(steps) as inputs:
        for batch in batches:
            load_batch(inputs, teacher, _wanted(paired, steps), batch)
            x = inputs[IMAGES]
            for i, step in enumerate(steps):
                fed_by_teacher[i] += step.forward()[2][-1].item()
                outputs, _, losses = step.forward(x)
                x = outputs[-1]
                fed_by_student[i] += losses[-1].item()
    names = [paired.cuts[step.group[-1]].name if step.group[-1] < len(paired.cuts) else "logits" for step in steps]
    return {name: s / max(t, 1e-12) for name, s, t in list(zip(names, fed_by_student, fed_by_teacher))[1:]}


def probe_losses(
    paired: PairedBlocks,
    teacher: Teacher,
    steps: list[GroupStep],
    batches: Iterable[Batch],
) -> dict[str, float]:
    """Mean training loss of each group over `batches`, without training."""
    sums, count = [0.0] * len(steps), 0
    with untouched(paired.student), other_inputs(steps) as inputs:
        for batch in batches:
            load_batch(inputs, teacher, _wanted(paired, steps), batch)
            for i, step in enumerate(steps):
                sums[i] += sum(loss.item() for loss in step.forward()[2])
            count += 1
    return {step.name: total / count for step, total in zip(steps, sums)}


def composed_output(paired: PairedBlocks, steps: list[GroupStep], images: Tensor) -> Tensor:
    """Logits of the student composed of the groups' blocks, in eval mode."""
    with torch.no_grad(), evaluation_mode(nn.ModuleList([paired.student, *paired.student_blocks])):
        x = images
        for step in steps:
            for block in step.blocks:
                x = block(x)
    return x


def _wanted(paired: PairedBlocks, steps: list[GroupStep]) -> set[int]:
    return steps[0].objectives.teacher_outputs([step.group for step in steps], len(paired.cuts))


@dataclass
class MergeRecord:
    """One merge as it is reported; survives a resume as plain JSON."""

    step: int
    stage: int
    exposure_gap: dict[str, float]
    max_output_difference: float
    loss_at_merge: dict[str, float]
    merged: list[str]
    """Groups that are new in this stage."""
    steps_until_recovered: int | None = None
    """Steps until the merged groups' mean loss over the last `WINDOW` steps fell below its value at the merge."""
    steps_seen: int = 0
    recent: list[float] = field(default_factory=list)

    def watch(self, losses: dict[str, float]) -> None:
        """Take one training step's losses by group name."""
        self.steps_seen += 1
        recent = deque(self.recent, maxlen=WINDOW)
        recent.append(sum(losses[name] for name in self.merged))
        self.recent = list(recent)
        if self.steps_until_recovered is None and len(recent) == WINDOW:
            if sum(recent) / WINDOW < sum(self.loss_at_merge[name] for name in self.merged):
                self.steps_until_recovered = self.steps_seen

    def report(self) -> dict:
        values = asdict(self)
        for private in ("recent", "steps_seen"):
            del values[private]
        return values
