"""Checkpoints for exact resume, and the student's export. Safetensors with JSON metadata: nothing is unpickled."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from stablekd_fast.errors import CheckpointError
from stablekd_fast.files import write_atomically

FORMAT = 1


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict) -> None:
    """Write `tensors` and JSON `metadata` to `path` atomically: whole, or not at all.

    Raises TrainingError if the disk refuses; the file that was there before stays.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = safetensors.torch.save(contiguous, {"stablekd": json.dumps(metadata)})
    write_atomically(path, data)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors and metadata of a file written by `save_tensors`. Raises CheckpointError if it is missing or damaged."""
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, _metadata(file)


def load_metadata(path: Path) -> dict:
    """The metadata alone. Raises CheckpointError if the file is missing or damaged."""
    with _opened(path) as file:
        return _metadata(file)


def _metadata(file) -> dict:
    return json.loads((file.metadata() or {}).get("stablekd", "{}"))


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
    differing = sorted(key for key in own.keys() | saved.keys() if own.get(key) != saved.get(key))
    if differing:
        listed = "; ".join(f"{key}: was {saved.get(key)!r}, is {own.get(key)!r}" for key in differing)
        raise CheckpointError(
            f"{checkpoint} belongs to a run with other settings ({listed}). Resume with the same settings, "
            "or start anew with another --out."
        )
