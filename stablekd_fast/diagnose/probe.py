"""Looks at the blocks of a student in training and leaves the training as it was."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from stablekd_fast.blocks import PairedBlocks
from stablekd_fast.blocks.modes import untouched
from stablekd_fast.data import Batch
from stablekd_fast.diagnose.measures import GradientNoise, cosine, curvature, difference, relative_change
from stablekd_fast.engine.inputs import IMAGES, StageInputs, load_batch
from stablekd_fast.engine.schedule import Optimizer
from stablekd_fast.engine.stage import stage_steps
from stablekd_fast.engine.step import GroupStep, Rates, named_parameters_of
from stablekd_fast.execution.precision import FP32
from stablekd_fast.objectives import Objectives
from stablekd_fast.teacher.live import Relay

Weights = list[list[Tensor]]
"""Copies of the weights of every block."""


def in_float32(paired: PairedBlocks) -> PairedBlocks:
    """Return the same blocks, which compute in float32 whatever they train in.

    Differences of gradients are small numbers.
    """
    return replace(paired, precision=FP32)


def probe_inputs(
    paired: PairedBlocks, objectives: Objectives, batches: Iterable[Batch], device: torch.device
) -> list[StageInputs]:
    """Load the probe batches with all that the teacher gives for them, for groups of any size."""
    alone = [[k] for k in range(len(paired))]
    wanted, teacher, loaded = objectives.teacher_outputs(alone, len(paired.cuts)), Relay(in_float32(paired)), []
    for batch in batches:
        inputs = StageInputs(device)
        load_batch(inputs, teacher, wanted, batch)
        loaded.append(inputs)
    return loaded


class Probe:
    """Measures the groups of a stage at one training step after the other.

    Args:
        paired: the pair in training, its student in training mode.
        groups: the stage's.
        inputs: the probe batches (see `probe_inputs`), which are the same at every step.
    """

    def __init__(
        self, paired: PairedBlocks, groups: list[list[int]], objectives: Objectives, inputs: list[StageInputs]
    ) -> None:
        self.paired, self.inputs = in_float32(paired), inputs
        rates = Rates.constant(0.0, device=inputs[0].device)
        self.groups = stage_steps(
            self.paired, groups, objectives, Optimizer("sgd"), rates=rates, inputs=inputs[0]
        ).steps
        self.parameters = [list(named_parameters_of(paired, [k]).values()) for k in range(len(paired))]
        self._entries: list[Tensor] = []
        """What fed each block at the last step that was looked at."""

    def weights(self) -> Weights:
        return [[parameter.detach().clone() for parameter in block] for block in self.parameters]

    def look(self, turn: int, before: Weights) -> tuple[list[dict], list[dict]]:
        """Measure the step that led from the weights `before` to the present ones.

        Return a row per block, and a row per cut inside a group. Gradients change on the probe batch whose turn it is:
        `turn` counts the steps looked at.
        """
        after = self.weights()
        with self._untouched(after):
            self._put(before)
            blocks = [signal | loss for signal, loss in zip(self._signals(), self._losses())]
            for row, drift in zip(blocks, self._drift()):
                row["drift"] = drift
            cuts = []
            for group in self.groups:
                changes, own_cuts = self._changes(group, turn % len(self.inputs), before, after)
                for k, row in changes.items():
                    blocks[k] |= row
                cuts += own_cuts
        return [{"block": k, **row} for k, row in enumerate(blocks)], cuts

    @contextmanager
    def _untouched(self, weights: Weights) -> Iterator[None]:
        """Bring weights, buffers and random state back afterwards."""
        with untouched(self.paired.student):
            try:
                yield
            finally:
                self._put(weights)

    def _put(self, weights: Weights) -> None:
        for parameters, values in zip(self.parameters, weights):
            for parameter, value in zip(parameters, values):
                parameter.copy_(value)

    def _gradients(self, group: GroupStep, batch: int) -> dict[int, list[Tensor]]:
        """Return the gradients of the group's loss by block.

        What is random in the network (dropout) depends on the batch alone.
        """
        group.inputs = self.inputs[batch]
        torch.manual_seed(batch)
        parameters = [parameter for k in group.group for parameter in self.parameters[k]]
        with torch.enable_grad():
            outputs, gradients, _ = group.forward()
        with self.paired.precision.products(group.device):
            found = iter(torch.autograd.grad(outputs, parameters, gradients, allow_unused=True, materialize_grads=True))
        return {k: [next(found) for _ in self.parameters[k]] for k in group.group}

    def _signals(self) -> list[dict]:
        noises = [GradientNoise() for _ in self.parameters]
        for group in self.groups:
            for batch in range(len(self.inputs)):
                for k, gradient in self._gradients(group, batch).items():
                    noises[k].add(gradient)
        return [{"signal": n.signal, "noise": n.noise, "signal_share": n.signal_share} for n in noises]

    def _losses(self) -> list[dict]:
        """Return the mean loss at each block's end: fed as in training, and fed by the student's own blocks alone."""
        rows: list[dict] = [{"loss": None, "composed_loss": None} for _ in self.parameters]
        for batch, inputs in enumerate(self.inputs):
            composed = inputs[IMAGES]
            for group in self.groups:
                group.inputs = inputs
                ends = [k for k in group.group if k in group.aligned or k == len(self.paired.cuts)]
                torch.manual_seed(batch)
                fed = group.forward()[2]
                torch.manual_seed(batch)
                outputs, _, chained = group.forward(composed)
                composed = outputs[-1]
                for k, *losses in zip(ends, fed, chained):
                    for name, loss in zip(rows[k], losses):
                        rows[k][name] = (rows[k][name] or 0.0) + loss.item() / len(self.inputs)
        return rows

    def _drift(self) -> list[float | None]:
        """Return the relative change, since the last look, of what feeds each block on the first probe batch."""
        entries, earlier = self._feeds(self.inputs[0]), self._entries
        self._entries = entries
        return [relative_change([x], [was]) for x, was in zip(entries, earlier)] or [None] * len(entries)

    def _feeds(self, inputs: StageInputs) -> list[Tensor]:
        entries = []
        for group in self.groups:
            group.inputs = inputs
            torch.manual_seed(0)
            x = group.entry()
            with self.paired.precision.applied(group.device):
                for block in group.blocks:
                    entries.append(x)
                    x = block(x)
        return entries

    def _changes(
        self, group: GroupStep, batch: int, before: Weights, after: Weights
    ) -> tuple[dict[int, dict], list[dict]]:
        """Return how the group's gradients change in a step: by block, and how much of it each cut inside would take.

        A cut takes away the change that is due to the blocks on its other side.
        """

        def moved(updated: Collection[int]) -> dict[int, list[Tensor]]:
            """Return the gradients where only these blocks have made their step."""
            self._put([after[k] if k in updated else before[k] for k in range(len(before))])
            return self._gradients(group, batch)

        old, new = moved(()), moved(range(len(self.parameters)))
        rows, cuts = {}, []
        for k in group.group:
            own = moved([k])[k]
            rows[k] = {
                "entanglement": relative_change(new[k], own, old[k]),
                "own_change": relative_change(own, old[k]),
                "cosine": cosine(new[k], old[k]),
                "curvature": curvature(difference(after[k], before[k]), old[k], new[k]),
            }
        for cut in group.group[:-1]:
            sides = range(cut + 1), range(cut + 1, len(self.parameters))
            apart = {k: gradient for side in sides for k, gradient in moved(side).items() if k in side}
            taken = [relative_change(new[k], apart[k], old[k]) for k in group.group]
            cuts.append({"cut": cut, "entanglement": sum(taken) / len(taken)})
        return rows, cuts
