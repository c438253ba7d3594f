"""Checkpoints for exact resume, and the student's export. Safetensors with JSON metadata: nothing is unpickled.

A checkpoint holds, under these names: the student's own tensors (`student/NAME`), the moving average of its parameters
(`average/NAME`), optimizer states (`optimizer/PARAMETER/KEY`), loss scales (`loss_scale/GROUP/KEY`), bridges
(`bridge/CUT`), what an auxiliary loss learns and remembers (`auxiliary/NAME`), made images and what makes them
(`synthesis/NAME`), and the states of the random generators
(`random/cpu`, `random/cuda`). Its metadata hold the progress, and what was decided for the run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from stablekd_fast.blocks import PairedBlocks
from stablekd_fast.engine.parts import Parts
from stablekd_fast.engine.progress import MergeRecord, Progress
from stablekd_fast.engine.step import GroupStep
from stablekd_fast.errors import CheckpointError
from stablekd_fast.execution.process import random_states, set_random_states
from stablekd_fast.files import write_atomically
from stablekd_fast.files.reading import check_format
from stablekd_fast.files.sealed import check_tensors, sealed_file, text_of
from stablekd_fast.models.weights import restore_state

STUDENT, AVERAGE, OPTIMIZER, LOSS_SCALE, BRIDGE = "student", "average", "optimizer", "loss_scale", "bridge"
RANDOM, AUXILIARY, SYNTHESIS = "random", "auxiliary", "synthesis"
FORMAT = 1
"""The version of a checkpoint's names and metadata; files of earlier versions have none, and are alike."""

_ADDED = {
    "deterministic": False, "folded_teacher": False, "auxiliary": None, "auxiliary_options": {}, "synthesis": None,
    "synthesis_options": {}, "head": "classifier",
}  # fmt: skip
"""Settings that checkpoints of earlier versions do not hold, and what was so then."""
_MAY_CHANGE = ("data", "on_bad_image")
"""A resumed run may find the same images at another place, and may leave out bad ones from then on."""


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict) -> None:
    """Write `tensors` and JSON `metadata` to `path` atomically: whole, or not at all.

    Raises TrainingError if the disk refuses; the file that was there before stays.
    """
    contiguous, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        contiguous[name] = tensor.clone() if place in seen else tensor  # the format knows no shared memory
        seen.add(place)
    write_atomically(path, *sealed_file(contiguous, json.dumps(metadata)))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors and metadata of a file written by `save_tensors`. Raises CheckpointError if it is missing or damaged."""
    with _opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        check_tensors(file.metadata(), tensors)
        return tensors, _metadata(file)


def load_metadata(path: Path) -> dict:
    """The metadata alone. Raises CheckpointError if the file is missing or damaged."""
    with _opened(path) as file:
        return _metadata(file)


def _metadata(file) -> dict:
    return json.loads(text_of(file.metadata()))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator:
    try:
        with safetensors.safe_open(path, "pt") as file:
            yield file
    except FileNotFoundError:
        raise CheckpointError(f"There is no file {path}; check the path (a new run starts without --resume).") from None
    except (safetensors.SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}). It is damaged or no safetensors file; "
            "restore it from a copy, or start the run anew in another directory."
        ) from error


def optimizer_tensors(prefix: str, parameters: dict[str, torch.nn.Parameter], optimizer) -> dict[str, Tensor]:
    """An optimizer's state as flat names `<prefix>/<parameter>/<key>`."""
    return {
        f"{prefix}/{name}/{key}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
        if isinstance(value, Tensor)
    }


def load_optimizer_tensors(
    prefix: str, parameters: dict[str, torch.nn.Parameter], optimizer, tensors: dict[str, Tensor]
) -> None:
    """Copy the states named `<prefix>/<parameter>/<key>` into those of `optimizer`; what it does not keep is left
    out."""
    for name, parameter in parameters.items():
        for key, state in optimizer.state[parameter].items():
            saved = tensors.get(f"{prefix}/{name}/{key}")
            if saved is not None:
                state.copy_(saved)


def check_same_run(checkpoint: Path, saved: dict, own: dict) -> None:
    """Raise CheckpointError with the difference if the settings `saved` in a checkpoint are not one's own."""
    then = {"images": own.get("images"), **_ADDED}
    saved = {key: value for key, value in then.items() if key in own} | saved
    foreign = sorted(own.keys() ^ saved.keys())
    if foreign:
        raise CheckpointError(
            f"{checkpoint} was written by another version of stablekd_fast, which has other settings than this one "
            f"({', '.join(foreign)}). Resume the run with that version, or start anew with another --out."
        )
    differing = sorted(key for key in own if own[key] != saved[key])
    differing = [key for key in differing if key not in _MAY_CHANGE]
    begun = ends_of(saved.get("epochs"))
    if begun == ends_of(own.get("epochs"))[: len(begun)]:  # it may have been extended
        differing = [key for key in differing if key != "epochs"]
    if differing == ["images"]:
        raise CheckpointError(
            f"{checkpoint} belongs to a run on other training images: their number, their names, labels or contents "
            "have changed since. Put the images back, or start anew with another --out."
        )
    if differing:
        listed = "; ".join(f"{key}: was {saved[key]!r}, is {own[key]!r}" for key in differing)
        raise CheckpointError(
            f"{checkpoint} belongs to a run with other settings ({listed}). Resume with the same settings, "
            "or start anew with another --out."
        )


def ends_of(epochs: Any) -> list:
    """The epochs of a run as its identity holds them: a number, or several where the run was extended."""
    return epochs if isinstance(epochs, list) else [epochs]


@dataclass
class RunState:
    """What a run changes while it trains, beside the student: all of it is saved, and comes back on resume."""

    progress: Progress = field(default_factory=Progress)
    average: dict[str, Tensor] | None = None
    """The moving average of the student's parameters by name, where one is kept."""
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    """States of optimizers and loss scales, by their names in the checkpoint, as they were last saved or loaded."""

    def start_average(self, student: nn.Module) -> dict[str, Tensor]:
        """Return the moving average, which begins as a copy of the parameters."""
        if self.average is None:
            self.average = {name: p.detach().clone() for name, p in student.named_parameters()}
        return self.average

    def take_optimizers(self, steps: Iterable[GroupStep]) -> None:
        """Keep the states of the steps' optimizers and loss scales, for a checkpoint and for the next stage."""
        self.optimizer = {}
        for step in steps:
            self.optimizer |= optimizer_tensors(OPTIMIZER, step.parameters, step.optimizer)
            if step.loss_scale is not None:
                scale = step.loss_scale.state()
                self.optimizer |= {f"{LOSS_SCALE}/{step.name}/{name}": value for name, value in scale.items()}

    def give_optimizers(self, steps: Iterable[GroupStep], *, scales: bool) -> None:
        """Copy the kept states into the steps' optimizers, and into their loss scales if `scales`."""
        for step in steps:
            load_optimizer_tensors(OPTIMIZER, step.parameters, step.optimizer, self.optimizer)
            if scales and step.loss_scale is not None:
                for name, value in step.loss_scale.state().items():
                    value.copy_(self.optimizer[f"{LOSS_SCALE}/{step.name}/{name}"])


def save_run(parts: Parts, state: RunState) -> None:
    """Write the run's checkpoint. Raises TrainingError if the disk refuses; the checkpoint before it stays."""
    tensors = {f"{STUDENT}/{name}": value for name, value in parts.paired.student.state_dict().items()}
    tensors |= state.optimizer
    tensors |= {f"{AVERAGE}/{name}": value for name, value in (state.average or {}).items()}
    tensors |= {f"{BRIDGE}/{cut}": weight for cut, weight in _bridge_weights(parts.paired)}
    tensors |= {f"{RANDOM}/{name}": value for name, value in random_states(parts.device).items()}
    if parts.objectives.module is not None:
        tensors |= {f"{AUXILIARY}/{name}": value for name, value in parts.objectives.module.state_dict().items()}
    if parts.synthesised is not None:
        tensors |= {f"{SYNTHESIS}/{name}": value for name, value in parts.synthesised.state().items()}
    metadata = {
        "format": FORMAT,
        "identity": parts.identity,
        "plan": parts.plan.plain(),
        "precision": parts.paired.precision.name,
        "progress": dataclasses.asdict(state.progress),
        "layouts": [parts.ranks.size, [layout.plain() for layout in parts.layouts]],
    }
    save_tensors(parts.checkpoint, tensors, metadata)


def resume_run(parts: Parts) -> RunState:
    """Take student, bridges and random state from the run's checkpoint, and return the rest.

    Raises CheckpointError if there is none, or if it belongs to a run with other settings.
    """
    tensors, metadata = parts.ranks.from_first(lambda: load_tensors(parts.checkpoint))
    form, remedy = metadata.get("format", FORMAT), "Use the one that wrote it."
    check_format(str(parts.checkpoint), form, FORMAT, CheckpointError, remedy)
    check_same_run(parts.checkpoint, metadata.get("identity", {}), parts.identity)
    progress = metadata["progress"]
    merge = progress.pop("merge")
    state = RunState(Progress(**progress, merge=MergeRecord(**merge) if merge else None))
    restore_state(parts.paired.student, below(tensors, STUDENT))
    if parts.objectives.module is not None:
        restore_state(parts.objectives.module, below(tensors, AUXILIARY))
    if parts.synthesised is not None:
        parts.synthesised.restore(below(tensors, SYNTHESIS))
    kept = (f"{OPTIMIZER}/", f"{LOSS_SCALE}/")
    state.optimizer = {name: tensor for name, tensor in tensors.items() if name.startswith(kept)}
    if parts.execution.ema is not None:
        averaged, parameters = below(tensors, AVERAGE), parts.paired.student.named_parameters()
        state.average = {name: torch.empty_like(p).copy_(averaged[name]) for name, p in parameters}
    for cut, weight in _bridge_weights(parts.paired):
        weight.copy_(tensors[f"{BRIDGE}/{cut}"])
    set_random_states(parts.device, below(tensors, RANDOM))
    return state


def below(tensors: dict[str, Tensor], head: str) -> dict[str, Tensor]:
    """Return the tensors named `HEAD/NAME` by their `NAME`."""
    return {name.removeprefix(f"{head}/"): value for name, value in tensors.items() if name.startswith(f"{head}/")}


def _bridge_weights(paired: PairedBlocks) -> Iterator[tuple[int, Tensor]]:
    """The cuts at which a bridge has weights, and these."""
    for cut, bridge in enumerate(paired.bridges):
        if bridge is not None and bridge.weight is not None:
            yield cut, bridge.weight
