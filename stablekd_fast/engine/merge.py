"""What happens at a merge, measured: exposure gap, continuity of the composed student, recovery of the loss."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from stablekd_fast.blocks import PairedBlocks, evaluation_mode
from stablekd_fast.blocks.modes import untouched
from stablekd_fast.data import Batch
from stablekd_fast.engine.inputs import IMAGES, StageInputs, load_batch
from stablekd_fast.engine.parts import Parts
from stablekd_fast.engine.progress import MergeRecord, Progress
from stablekd_fast.engine.step import GroupStep
from stablekd_fast.models.outputs import logits_of
from stablekd_fast.teacher.live import Teacher

PROBE_BATCHES = 4
"""Training batches on which exposure and the loss at a merge are measured."""


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
    names = [_end_of(paired, step.group) for step in steps]
    return {name: s / max(t, 1e-12) for name, s, t in list(zip(names, fed_by_student, fed_by_teacher))[1:]}


def _end_of(paired: PairedBlocks, group: list[int]) -> str:
    """The name of the place where a group's last loss lies."""
    last = min(group[-1], len(paired.cuts) - 1) if paired.head == "none" else group[-1]
    if last < len(paired.cuts):
        return paired.cuts[last].name
    return "logits" if paired.head == "classifier" else "embedding"


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


class Merges:
    """Measures around the merges of a run, none of which changes training."""

    def __init__(self, parts: Parts, progress: Progress) -> None:
        self.parts, self.progress = parts, progress
        self._composed_before: Tensor | None = None
        """The composed student's outputs on the first probe images at the end of the last stage."""

    def leave(self, steps: list[GroupStep]) -> dict[str, float]:
        """At the end of a stage of several groups: note exposure gap and outputs of the composed student; the gap."""
        probes = self._probes()
        self.progress.exposure = exposure_gap(self.parts.paired, self.parts.teacher, steps, self._as_trained(probes))
        self._composed_before = composed_output(self.parts.paired, steps, self._images(probes))
        return self.progress.exposure

    def enter(self, stage: int, steps: list[GroupStep]) -> None:
        """At the start of a stage: compare with the one before, and begin to watch how the loss recovers."""
        apart = self.parts.stages[stage - 1].stage.groups
        probes = self._probes()
        images, before = self._images(probes), self._composed_before
        if before is None:  # resumed right at the merge: the plain student is what stood before it
            student = self.parts.paired.student
            with torch.no_grad(), evaluation_mode(student):
                before = logits_of(student(images))
        after = composed_output(self.parts.paired, steps, images)
        losses = probe_losses(self.parts.paired, self.parts.teacher, steps, self._as_trained(probes))
        self.progress.merge = MergeRecord(
            step=self.parts.stages[stage].first,
            stage=stage,
            exposure_gap=self.progress.exposure,
            max_output_difference=(before - after).abs().max().item(),
            loss_at_merge=losses,
            merged=[step.name for step in steps if step.group not in apart],
        )

    def _probes(self) -> list[Batch]:
        return list(self.parts.source.batches(0, PROBE_BATCHES))

    def _images(self, probes: list[Batch]) -> Tensor:
        """The first probe batch's images, in float32 as the composed student computes."""
        return probes[0].pixels.to(self.parts.device, non_blocking=True)

    def _as_trained(self, batches: list[Batch]) -> Iterator[Batch]:
        """The batches with images as steps read them."""
        dtype = self.parts.execution.image_dtype
        return (replace(batch, images=batch.pixels.to(dtype)) for batch in batches)
