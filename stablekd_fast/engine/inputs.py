"""The buffers that a stage's steps read: one batch, and what the teacher gives for it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor

from stablekd_fast.data import Batch
from stablekd_fast.errors import TrainingError
from stablekd_fast.teacher.live import Teacher

IMAGES, LABELS, IDS, SECOND = "images", "labels", "ids", "second"


def output_key(output: int) -> str:
    """Return the name of the buffer that holds one of the teacher's outputs."""
    return f"teacher{output}"


class StageInputs:
    """Static buffers on the device for one batch: images, labels, teacher activations at cuts, teacher logits.

    The first `load` of a name lays its buffer out; from then on shape, dtype and strides must stay. A value is always
    copied, never adopted: a captured step writes and reads these very buffers.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.wants_ids = False
        """Whether a step reads the samples' ids."""
        self._buffers: dict[str, Tensor] = {}

    def load(self, name: str, value: Tensor) -> None:
        """Copy `value` (from the host too) into the buffer `name`. Raises TrainingError if its metadata changed."""
        buffer = self._buffers.get(name)
        if buffer is None:
            buffer = self._buffers[name] = torch.empty_like(value, device=self.device)
        if value.shape != buffer.shape or value.dtype != buffer.dtype or value.stride() != buffer.stride():
            got, expected = (_metadata(value), _metadata(buffer))
            if got != expected:
                raise TrainingError(
                    f"The step's input {name!r} has changed: expected {expected}, got {got}. "
                    "All batches of a run must have one size; drop or pad the last one."
                )
        buffer.copy_(value, non_blocking=True)

    def __getitem__(self, name: str) -> Tensor:
        return self._buffers[name]


def _metadata(tensor: Tensor) -> str:
    """Describe a tensor's layout. Strides of dimensions of size one are left out: they say nothing."""
    strides = [stride for size, stride in zip(tensor.shape, tensor.stride()) if size > 1]
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} with strides {strides}"


def load_batch(inputs: StageInputs, teacher: Teacher, wanted: Collection[int], batch: Batch) -> None:
    """Fill the stage's inputs with a batch, with its images where it has some, and the teacher's wanted outputs for
    it."""
    fill_inputs(inputs, *served(teacher, wanted, batch, inputs.device))


def served(
    teacher: Teacher, wanted: Collection[int], batch: Batch, device: torch.device
) -> tuple[Batch, dict[int, Tensor]]:
    """Return a batch with images and labels on `device`, and the teacher's wanted outputs for it."""
    moved = {
        name: value.to(device, non_blocking=True)
        for name, value in (("images", batch.images), ("labels", batch.labels), ("second", batch.second))
        if value is not None
    }
    return replace(batch, **moved), teacher.outputs(wanted, moved.get("images"), batch)


def fill_inputs(inputs: StageInputs, batch: Batch, outputs: dict[int, Tensor]) -> None:
    """Copy what was `served` into the stage's inputs."""
    if batch.images is not None:
        inputs.load(IMAGES, batch.images)
    if batch.second is not None:
        inputs.load(SECOND, batch.second)
    if inputs.wants_ids:
        inputs.load(IDS, batch.sample_ids)
    inputs.load(LABELS, batch.labels)
    for k, output in outputs.items():
        inputs.load(output_key(k), output)
