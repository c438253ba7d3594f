"""One group's training step over buffers that belong to the stage.

Callers copy a batch into `StageInputs`; every group of the stage reads from there. A step makes no decision on
data, reads nothing back to the host, and takes what changes from step to step from tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stablekd_fast.blocks import PairedBlocks
from stablekd_fast.data import Batch
from stablekd_fast.errors import ConfigError, TrainingError
from stablekd_fast.schedule import Optimizer, group_name
from stablekd_fast.teacher import Teacher

IMAGES, LABELS = "images", "labels"


def output_key(output: int) -> str:
    """Name of the buffer that holds one of the teacher's outputs."""
    return f"teacher{output}"


class StageInputs:
    """Static buffers for one batch: images, labels, teacher activations at cuts, teacher logits.

    The first `load` of a name lays its buffer out; from then on shape, dtype and device must stay.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def load(self, name: str, value: Tensor) -> None:
        """Copy `value` into the buffer `name`. Raises TrainingError if its metadata changed."""
        buffer = self._buffers.get(name)
        if buffer is None:
            buffer = self._buffers[name] = torch.empty_like(value)
        got, expected = (_metadata(value), _metadata(buffer))
        if got != expected:
            raise TrainingError(
                f"The step's input {name!r} has changed: expected {expected}, got {got}. "
                "All batches of a run must have one size; drop or pad the last one."
            )
        buffer.copy_(value)

    def __getitem__(self, name: str) -> Tensor:
        return self._buffers[name]


def _metadata(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


@dataclass(frozen=True)
class Objectives:
    """What the student is trained towards.

    `align`: at which cuts features are aligned, `none`, `ends` (a group's own end) or `all` (cuts inside merged
    groups too). `use_teacher_logits`, `use_labels`: what the head's loss takes.
    """

    feature: Callable
    logits: Callable
    align: str
    use_teacher_logits: bool = True
    use_labels: bool = True

    def aligned_cuts(self, group: list[int], cut_count: int) -> list[int]:
        if self.align == "none":
            return []
        return [block for block in (group if self.align == "all" else group[-1:]) if block < cut_count]

    def teacher_outputs(self, groups: list[list[int]], cut_count: int) -> set[int]:
        """The teacher's outputs that these groups read, numbered as in `teacher.py`."""
        wanted = {cut for group in groups for cut in self.aligned_cuts(group, cut_count)}
        wanted |= {group[0] - 1 for group in groups if group[0] > 0}
        return wanted | {cut_count} if self.use_teacher_logits else wanted


class GroupStep:
    """Forward, loss with gradient, backward and optimizer of one group of merged blocks."""

    def __init__(
        self, paired: PairedBlocks, group: list[int], objectives: Objectives, optimizer: Optimizer, inputs: StageInputs
    ) -> None:
        self.group, self.name = group, group_name(group)
        self.paired, self.objectives, self.inputs = paired, objectives, inputs
        self.blocks = [paired.student_blocks[k] for k in group]
        self.aligned = set(objectives.aligned_cuts(group, len(paired.cuts)))
        self.parameters = named_parameters_of(paired, group)
        device = next(iter(self.parameters.values())).device if self.parameters else torch.device("cpu")
        self.lr = torch.zeros((), device=device)
        self.optimizer = build_optimizer(optimizer, list(self.parameters.values()), self.lr)
        self.loss = torch.zeros((), device=device)
        self.steps_done = torch.zeros((), dtype=torch.int64, device=device)
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=device)
        """The count of this stage's step whose loss was first not finite, -1 while there is none."""

    def set_rates(self, lr: float, momentum: float) -> None:
        self.lr.fill_(lr)
        for group in self.optimizer.param_groups:
            if "momentum" in group:
                group["momentum"] = momentum

    def run(self) -> None:
        """Train on the batch in the inputs; `loss` then holds the group's loss."""
        outputs, gradients, losses = self.forward()
        loss = torch.stack(losses).sum()
        torch.autograd.backward(outputs, gradients)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss.copy_(loss)
        newly_bad = ~torch.isfinite(loss) & (self.first_bad < 0)
        self.first_bad.copy_(torch.where(newly_bad, self.steps_done, self.first_bad))
        self.steps_done += 1

    def forward(self, entry: Tensor | None = None) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Student outputs that carry a loss, the gradient at each, and the losses.

        `entry` replaces the teacher-fed input of the group (used to measure exposure).
        """
        x = self._entry() if entry is None else entry
        outputs, gradients, losses = [], [], []
        for k, block in zip(self.group, self.blocks):
            x = block(x)
            if k in self.aligned:
                axis = self.paired.cuts[k].student_channel_axis
                loss, gradient = self.objectives.feature(x.detach(), self.inputs[output_key(k)], axis)
            elif k == len(self.paired.cuts):
                teacher = self.inputs[output_key(k)] if self.objectives.use_teacher_logits else None
                labels = self.inputs[LABELS] if self.objectives.use_labels else None
                loss, gradient = self.objectives.logits(x.detach(), teacher, labels)
            else:
                continue
            outputs.append(x)
            gradients.append(gradient)
            losses.append(loss)
        return outputs, gradients, losses

    def _entry(self) -> Tensor:
        return self.inputs[IMAGES] if self.group[0] == 0 else self.inputs[output_key(self.group[0] - 1)]


def load_batch(
    inputs: StageInputs,
    teacher: Teacher,
    wanted: Collection[int],
    batch: Batch,
    to_device: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> None:
    """Fill the stage's inputs with a batch and the teacher's wanted outputs for it."""
    images = to_device(batch.images)
    inputs.load(IMAGES, images)
    inputs.load(LABELS, to_device(batch.labels))
    for k, output in teacher.outputs(wanted, images, batch).items():
        inputs.load(output_key(k), output)


def named_parameters_of(paired: PairedBlocks, group: list[int]) -> dict[str, nn.Parameter]:
    """The group's parameters by their names in the plain student."""
    names = {id(parameter): name for name, parameter in paired.student.named_parameters()}
    return {
        names[id(parameter)]: parameter
        for k in group
        for parameter in paired.student_blocks[k].parameters()
        if parameter.requires_grad
    }


def build_optimizer(settings: Optimizer, parameters: list[nn.Parameter], lr: Tensor) -> torch.optim.Optimizer:
    """A fused torch optimizer that reads its learning rate from the tensor `lr`.

    The tensor is put in afterwards: the constructors compare it with zero, which on a GPU waits for the device.
    """
    if settings.name == "adamw":
        optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=settings.weight_decay, fused=True)
    elif settings.name == "sgd":
        optimizer = torch.optim.SGD(
            parameters,
            lr=0.0,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            nesterov=settings.nesterov,
            fused=True,
        )
    else:
        raise ConfigError(f"optimizer.name={settings.name!r} was given; choose adamw or sgd.")
    for group in optimizer.param_groups:
        group["lr"] = lr
    return optimizer
