"""One group's training step over buffers that belong to the stage.

Callers copy a batch into `StageInputs`; every group of the stage reads from there. A step makes no decision on
data, reads nothing back to the host, and takes what changes from step to step from tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor, nn

from stablekd_fast.blocks import PairedBlocks, fuse_norms
from stablekd_fast.distributed import Averaging
from stablekd_fast.distributed import sync_norms as synced
from stablekd_fast.engine.inputs import IDS, IMAGES, LABELS, SECOND, StageInputs, output_key
from stablekd_fast.engine.optimizers import SGD, build_optimizer
from stablekd_fast.engine.schedule import Optimizer, PlannedStage, group_name
from stablekd_fast.engine.weights import CastWeights
from stablekd_fast.errors import ConfigError, CutError
from stablekd_fast.execution.capture import WARM_UP
from stablekd_fast.execution.precision import LossScale
from stablekd_fast.execution.process import fastest_algorithms
from stablekd_fast.objectives import Auxiliary, Objectives, StepBatch

AUXILIARY = "auxiliary."
"""Stands before the names of an auxiliary loss's parameters among those of the student."""


@dataclass(frozen=True)
class Rates:
    """What changes from step to step of a stage, on the device: `table` `[rows, 3]`, or `[1, 3]` for all steps, holds
    learning rate, momentum and EMA decay. A capture warms up by steps that do not count, from wherever the stage is: so
    as many rows follow that of the last step, else the device would read beyond the table."""

    table: Tensor

    @classmethod
    def of_stage(cls, planned: PlannedStage, ema: float | None, device: torch.device) -> Rates:
        """Make the table of a stage. The EMA's decay rises towards `ema`, so that it forgets the first weights
        quickly."""
        settings, rows = planned.stage.optimizer, []
        for step in range(planned.first, planned.last):
            progress = planned.progress(step)
            decay = min(ema or 0.0, (1 + step) / (10 + step))
            rows.append((settings.lr_at(progress), settings.momentum_at(progress), decay))
        return cls(torch.tensor(rows + rows[-1:] * WARM_UP, device=device))

    @classmethod
    def constant(cls, lr: float, momentum: float = 0.9, device: torch.device | str = "cpu") -> Rates:
        """Make a table of one row, which holds for every step."""
        return cls(torch.tensor([(lr, momentum, 0.0)], device=device))


class StepOptions(TypedDict, total=False):
    """What a step does beside the plain update, by keyword; see `GroupStep`."""

    position: int
    history: int
    ema: dict[str, Tensor] | None
    compiled: bool
    micro_batches: int
    averaging: Averaging | None
    sync_norms: bool


class GroupStep:
    """Forward, loss with gradient, backward and update of one group of merged blocks.

    Args:
        paired, group: the blocks, and which of them this step trains as one.
        inputs: the buffers that hold the batch and the teacher's outputs.
        rates: what changes from step to step of the stage: a row for each step, or one for all.
        position: how many steps of the stage are done.
        history: of how many last steps the losses are kept for reading.
        ema: an average of the student's parameters by name, which each step brings up to date.
        compiled: whether torch.compile makes forward and backward.
        micro_batches: into how many equal parts the batch is divided; forward and backward go through one after the
            other and add up their gradients.
        averaging: averages gradients and losses over the processes that train this group on other images.
        sync_norms: whether batch norms take their statistics over the images of those processes too.

    Raises CutError if the group has nothing to train, ConfigError for an optimizer that cannot skip a step in fp16.
    """

    def __init__(
        self,
        paired: PairedBlocks,
        group: list[int],
        objectives: Objectives,
        optimizer: Optimizer,
        inputs: StageInputs,
        *,
        rates: Rates,
        position: int = 0,
        history: int = 1,
        ema: dict[str, Tensor] | None = None,
        compiled: bool = False,
        micro_batches: int = 1,
        averaging: Averaging | None = None,
        sync_norms: bool = False,
    ) -> None:
        self.group, self.name = group, group_name(group)
        self.paired, self.objectives, self.inputs = paired, objectives, inputs
        blocks = [paired.student_blocks[k] for k in group]
        self.micro_batches, self.averaging = micro_batches, averaging
        if sync_norms and averaging is not None:
            self.blocks = [synced(block, averaging) for block in blocks]
        else:
            self.blocks = [fuse_norms(block) for block in blocks] if paired.fuses_norms else blocks
        self.aligned = set(objectives.aligned_cuts(group, len(paired.cuts)))
        self.parameters = trained = named_parameters_of(paired, group)
        if not trained:
            raise CutError(
                f"Block {self.name} of the student has nothing to train: no parameter in it, or none that requires a "
                "gradient. Move its cuts (`stablekd plan` shows the parameters of each block), or merge it with a "
                "neighbour."
            )
        self.auxiliary = own = objectives.module if objectives.helps(group, len(paired.cuts)) else None
        if own is not None:
            self.parameters = trained | {AUXILIARY + name: p for name, p in own.named_parameters()}
            inputs.wants_ids |= own.reads_ids
            own.gather = None if averaging is None else averaging.gather
        self.exchanges = averaging is not None and (sync_norms or (own is not None and own.gathers))
        """Whether forward and backward exchange something with other ranks."""
        device = self.device = inputs.device
        self.rates = rates.table
        self.current = rates.table[:1].clone()
        """The row of the table that holds for this step."""
        self.lr, self.momentum, self.ema_decay = self.current[0].unbind()
        self.clip = optimizer.clip
        self.optimizer = build_optimizer(optimizer, list(self.parameters.values()), self.lr, self.momentum)
        self.loss_scale = LossScale(device) if paired.precision.scales_loss else None
        if self.loss_scale is not None:
            _let_skip(self.optimizer, self.loss_scale)
        self.ema = None if ema is None else [ema[name] for name in trained]
        self._averaged: list[Tensor] = list(trained.values())
        self.weights = None
        if paired.precision.dtype != torch.float32 and not compiled:  # what is compiled casts where it computes
            self.weights = CastWeights(self.blocks, paired.precision.dtype)
        self.losses = torch.zeros(history, device=device)
        self.position = torch.full((), position, dtype=torch.int64, device=device)
        self._loss: Tensor | None = None
        self._whole: dict[int, Tensor] = {}
        self._network = _compiled(self._compute) if compiled else self._compute

    def run(self) -> None:
        """Train on the batch in the inputs. Reads nothing back to the host, and keeps no tensor that it made."""
        self.average_over_ranks(self.of_whole_batch())
        self.compute()
        self.average_over_ranks(self.of_own_part())
        self.finish()

    def of_whole_batch(self) -> list[Tensor]:
        """Find what the losses of parts need so that they add up to that of the whole batch. Returns what is then to
        be averaged over ranks, in place."""
        if self.micro_batches == 1 and self.averaging is None:
            return []
        targets = self._batch(None).targets
        found = {k: self.objectives.feature.whole_batch(targets[k]) for k in sorted(self.aligned)}
        self._whole = {k: value for k, value in found.items() if value is not None}
        return list(self._whole.values())

    def compute(self) -> None:
        """Take this step's rates; go forward and backward through the micro-batches. Gradients and loss are kept for
        `finish`."""
        self.take_rates()
        # float16 is too coarse for gradients that are scaled later: the losses scale them before they round.
        upstream = None if self.loss_scale is None else self.loss_scale.scale / self.micro_batches
        total = []
        self.cast_weights()
        batch = self._batch(self.auxiliary)
        if self.auxiliary is not None:
            batch = self.auxiliary.prepare(batch)
        for part in batch.parts(self.micro_batches):
            with self.paired.precision.applied(self.device):
                outputs, gradients, losses = self._network(part, self._whole, upstream, self.auxiliary)
            if self.micro_batches > 1 and upstream is None:
                gradients = [gradient / self.micro_batches for gradient in gradients]
            self.backward(outputs, gradients)
            total += losses
        loss = total[0] if len(total) == 1 else torch.stack(total).sum()
        self._loss = loss / self.micro_batches if self.micro_batches > 1 else loss

    def of_own_part(self) -> list[Tensor]:
        """Return the gradients and the loss of this rank's part of the batch, which are to be averaged over ranks."""
        assert self._loss is not None, "compute comes first"
        gradients = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        return [*gradients, self._loss]

    def average_over_ranks(self, tensors: list[Tensor]) -> None:
        """Overwrite tensors with their means over the processes that train this group on other images."""
        if self.averaging is not None and tensors:
            self.averaging.average(tensors)

    def finish(self) -> None:
        """Update the parameters and note the loss."""
        assert self._loss is not None, "compute comes first"
        self.update()
        self.note(self._loss)
        self._loss, self._whole = None, {}

    def take_rates(self) -> None:
        """Read the rates of this step from the table of the stage."""
        if len(self.rates) > 1:
            torch.index_select(self.rates, 0, self.position.view(1), out=self.current)

    def forward(self, entry: Tensor | None = None) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Student outputs that carry a loss at a cut or the head, the gradient at each, and the losses; an auxiliary
        one where it stands in place of the head's.

        `entry` replaces the teacher-fed input of the group (used to measure exposure).
        """
        own = self.auxiliary if self.auxiliary is not None and self.auxiliary.ends_networks else None
        batch = self._batch(own)
        self.cast_weights()
        with self.paired.precision.applied(self.device):
            return self._compute(batch if entry is None else batch._replace(entry=entry), {}, None, own)

    def entry(self) -> Tensor:
        """What feeds the group: images, or the teacher's activation before it."""
        first = self.group[0]
        return self.inputs[IMAGES] if first == 0 else self.inputs[output_key(first - 1)]

    def backward(self, outputs: list[Tensor], gradients: list[Tensor]) -> None:
        """Start backward from the gradients that the losses returned."""
        with self.paired.precision.products(self.device), fastest_algorithms(self.device):
            torch.autograd.backward(outputs, gradients)
        if self.weights is not None:
            self.weights.hand_back()

    def cast_weights(self) -> None:
        """Cast the weights to the type that forward passes compute in."""
        if self.weights is not None:
            self.weights.refresh()

    def update(self) -> None:
        """Clip the gradients, take the optimizer's step, and bring the moving average up to date."""
        parameters = [parameter for parameter in self.parameters.values() if parameter.grad is not None]
        if self.loss_scale is not None:
            self.loss_scale.take_off([parameter.grad for parameter in parameters if parameter.grad is not None])
        if self.clip is not None:
            nn.utils.clip_grad_norm_(parameters, self.clip, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.loss_scale is not None:
            self.loss_scale.update()
        if self.ema is not None:
            with torch.no_grad():
                torch._foreach_mul_(self.ema, self.ema_decay)
                torch._foreach_add_(self.ema, torch._foreach_mul(self._averaged, 1 - self.ema_decay))

    def note(self, loss: Tensor) -> None:
        """Keep the loss for reading later, as the last of `losses`."""
        self.losses.copy_(torch.cat([self.losses[1:], loss.to(self.losses.dtype).view(1)]))
        self.position += 1

    def state(self) -> list[Tensor]:
        """Return all tensors that outlive `run` and that it changes, but for the inputs."""
        own = [self.current, self.losses, self.position, *(self.ema or [])]
        if self.loss_scale is not None:
            own += [*self.loss_scale.state().values(), self.loss_scale.skipped]
        modules = self.blocks if self.auxiliary is None else [*self.blocks, self.auxiliary]
        networks = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
        optimizer = [value for state in self.optimizer.state.values() for value in state.values()]
        return list({id(tensor): tensor for tensor in (*own, *networks, *optimizer)}.values())

    @property
    def needs_images(self) -> bool:
        """Whether the step reads the images themselves."""
        return self.group[0] == 0 or (self.auxiliary is not None and self.auxiliary.reads_images)

    def _batch(self, own: Auxiliary | None) -> StepBatch:
        """Return what the inputs hold of all that this step reads, with what an auxiliary loss reads."""
        head, inputs = len(self.paired.cuts), self.inputs
        wanted = self.aligned | ({head} & set(self.group) if self.objectives.use_teacher_logits else set())
        if own is not None:
            wanted = wanted | own.teacher_outputs(own.config, head)
        labels = inputs[LABELS] if self.objectives.use_labels and (own is not None or head in self.group) else None
        batch = StepBatch(self.entry(), {k: inputs[output_key(k)] for k in sorted(wanted)}, labels)
        if own is None:
            return batch
        images, ids = inputs[IMAGES] if own.reads_images else None, inputs[IDS] if own.reads_ids else None
        return batch._replace(images=images, ids=ids, second=inputs[SECOND] if own.second else None)

    def _block(self, number: int, x: Tensor) -> Tensor:
        return self.blocks[number](x) if self.weights is None else self.weights.call(number, x)

    def _again(self, x: Tensor) -> dict[int, Tensor]:
        """Go forward from another input of the group; return its outputs by number."""
        found = {}
        with self.paired.precision.applied(self.device):
            for number, k in enumerate(self.group):
                x = found[k] = self._block(number, x)
        return found

    def _compute(
        self,
        batch: StepBatch,
        whole: dict[int, Tensor],
        upstream: Tensor | None,
        auxiliary: Auxiliary | None = None,
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        outputs, gradients, losses, found = [], [], [], {}
        if auxiliary is not None and auxiliary.reads_input_gradient:
            batch = batch._replace(entry=batch.entry.detach().requires_grad_(True))
        x = batch.entry
        for number, k in enumerate(self.group):
            x = found[k] = self._block(number, x)
            if k in self.aligned:
                axis = self.paired.cuts[k].student_channel_axis
                loss, gradient = self.objectives.feature(x.detach(), batch.targets[k], axis, whole.get(k), upstream)
            elif k == len(self.paired.cuts) and not (outputs and self.objectives.head == "none"):
                loss, gradient = self.objectives.logits(x.detach(), batch.targets.get(k), batch.labels, upstream)
            else:
                continue
            outputs.append(x)
            gradients.append(gradient)
            losses.append(loss)
        if auxiliary is not None:
            with torch.autocast(self.device.type, enabled=False):
                loss = auxiliary(batch, found, self._again)
            if loss.requires_grad:
                outputs.append(loss)
                gradients.append(torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype))
            losses.append(loss.detach())
        return outputs, gradients, losses


def _compiled(compute: Callable) -> Callable:
    """Have torch.compile make a function. Graphs of its own could not be captured in that of a stage."""
    return torch.compile(compute, dynamic=False, options={"triton.cudagraphs": False})


def _let_skip(optimizer: torch.optim.Optimizer, loss_scale: LossScale) -> None:
    """Make the optimizer leave everything as it is where gradients are not finite."""
    if not (isinstance(optimizer, SGD) or optimizer.defaults.get("fused")):
        raise ConfigError(
            f"precision=fp16 was given, but {type(optimizer).__name__} as it was chosen cannot skip a step without "
            "asking the host; choose optimizer.implementation=auto, or precision=bf16."
        )
    optimizer.found_inf = loss_scale.skipped  # type: ignore[attr-defined]  # torch's fused ones and ours look for it


def named_parameters_of(paired: PairedBlocks, group: list[int]) -> dict[str, nn.Parameter]:
    """Return the group's trainable parameters by their names in the plain student."""
    names = {id(parameter): name for name, parameter in paired.student.named_parameters()}
    return {
        names[id(parameter)]: parameter
        for k in group
        for parameter in paired.student_blocks[k].parameters()
        if parameter.requires_grad
    }
