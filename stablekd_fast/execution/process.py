"""What a run sets for its whole process while it lasts: the current GPU, determinism, and the random states; and
whether it has processors to spare."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from stablekd_fast.errors import ConfigError, TrainingError, first_line

_WORKSPACES = "CUBLAS_WORKSPACE_CONFIG"
_REPEATABLE = (":4096:8", ":16:8")
"""The sizes of cuBLAS's workspaces with which it adds in one order; it reads them at its first call in a process."""


def current_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A context in which a GPU is torch's current one, for whatever asks for none by its number. Nothing on a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def spare_processors() -> bool:
    """Whether there are more processors than torch computes with, on which threads read ahead and take nothing from
    training. Known on Linux only; elsewhere there are none."""
    return hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) > torch.get_num_threads()


@contextlib.contextmanager
def deterministic(device: torch.device, wanted: bool = True) -> Iterator[None]:
    """A context in which the same operations on the same values give the same bits each time; nothing if not `wanted`.

    torch then takes slower operations where its fast ones add in any order, and cuDNN does not choose by trial. The
    process's own settings come back afterwards. Raises ConfigError where cuBLAS was told otherwise, and TrainingError
    for an operation that has no deterministic form.
    """
    if not wanted:
        yield
        return
    cudnn: Any = torch.backends.cudnn  # its settings are made when they are set
    told = os.environ.get(_WORKSPACES)
    if device.type == "cuda" and told not in (None, *_REPEATABLE):
        raise ConfigError(
            f"deterministic=true was given, but {_WORKSPACES}={told} lets cuBLAS add in any order; unset it, or set it "
            f"to {_REPEATABLE[0]}."
        )
    before = torch.get_deterministic_debug_mode(), cudnn.deterministic, cudnn.benchmark
    try:
        if device.type == "cuda":
            os.environ[_WORKSPACES] = told or _REPEATABLE[0]
        torch.use_deterministic_algorithms(True)
        cudnn.deterministic, cudnn.benchmark = True, False
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        line, sooner = first_line(error).split(". ")[0], ""
        if "CuBLAS" in line:  # it had begun before
            sooner = f", or set {_WORKSPACES}={_REPEATABLE[0]} before the process starts"
        raise TrainingError(f"deterministic=true was given, but {line}. Train without it{sooner}.") from error
    finally:
        torch.set_deterministic_debug_mode(before[0])
        cudnn.deterministic, cudnn.benchmark = before[1:]
        if told is None:
            os.environ.pop(_WORKSPACES, None)


def random_states(device: torch.device) -> dict[str, Tensor]:
    """The states, uint8 on the CPU, of the random generators that training draws from: the CPU's, and that of a GPU,
    from which captured steps draw too."""
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_states(device: torch.device, states: Mapping[str, Tensor]) -> None:
    """Set the generators of `random_states`. A run that changes its device leaves the other generator as it is."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


@contextlib.contextmanager
def fastest_algorithms(device: torch.device) -> Iterator[None]:
    """A context in which cuDNN tries its algorithms at the first convolution of a kind, and keeps the fastest.

    For backward passes alone: forward passes of a student share their kinds with those of the teacher, whose stored
    rows are used again by processes that may choose otherwise. Nothing on a CPU, or where bits are to repeat.
    """
    cudnn: Any = torch.backends.cudnn
    before, repeats = cudnn.benchmark, cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
    if device.type != "cuda" or repeats:
        yield
        return
    cudnn.benchmark = True
    try:
        yield
    finally:
        cudnn.benchmark = before
