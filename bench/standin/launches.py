"""Triton's launches, recorded: the real operators bind, specialise and compile for a real chip, and nothing is run.

`TRITON_INTERPRET` must not be set when Triton is imported, so tests do this in a process of their own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from stablekd_fast.bench.standin.device import StandIn, standin

CAPABILITY = 90
_SHARED_BYTES, _THREADS, _PROCESSORS = 232_448, 1024, 132  # of an H100


@dataclass(frozen=True)
class Launch:
    """One launch: `device` and `stream` were current, `operands` are the devices of its tensors."""

    kernel: str
    device: int
    stream: int
    grid: tuple[int, int, int]
    operands: frozenset[int]
    shared_bytes: int
    warps: int


class _Utilities:
    """What Triton asks of the CUDA driver's library."""

    @staticmethod
    def get_device_properties(device: int) -> dict[str, int]:
        return {"max_shared_mem": _SHARED_BYTES, "multiprocessor_count": _PROCESSORS, "warpSize": 32}

    @staticmethod
    def load_binary(name: str, binary: bytes, shared: int, device: int) -> tuple[object, str, int, int, int]:
        return object(), name, 0, 0, _THREADS

    @staticmethod
    def unload_module(module: object) -> None:
        """Nothing was loaded."""


class _Driver:
    """Triton's driver of a GPU that is not there."""

    utils = _Utilities()

    def __init__(self, stand: StandIn, launches: list[Launch]) -> None:
        self.stand, self.launches = stand, launches

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """Return what Triton calls to launch a compiled kernel."""

        def launch(x: int, y: int, z: int, stream: int, function: str, *rest: Any) -> None:
            operands = {value.device.index or 0 for value in rest if isinstance(value, Tensor)}
            where = self.stand.index, stream, (x, y, z), frozenset(operands)
            self.launches.append(Launch(metadata.name, *where, metadata.shared, metadata.num_warps))

        return launch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", CAPABILITY, 32)

    def get_current_device(self) -> int:
        return self.stand.index

    def set_current_device(self, device: int) -> None:
        self.stand.exchange(device)

    def get_current_stream(self, device: int) -> int:
        return self.stand.streams[device].number

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", self.stand.index)

    def get_device_interface(self) -> Any:
        return torch.cuda


@contextlib.contextmanager
def recorded_launches(**settings: object) -> Iterator[tuple[StandIn, list[Launch]]]:
    """A context in which tensors that are made are fake ones, `cuda:0` is the current device, and every launch of a
    Triton kernel is recorded."""
    from torch._subclasses import fake_tensor
    from triton.runtime import driver

    launches: list[Launch] = []
    aligned = mock.patch.object(fake_tensor.FakeTensor, "data_ptr", lambda tensor: 16 * (1 + id(tensor) % 1024))
    # Some versions touch the real device when the first fake tensor is made.
    untouched = mock.patch.object(fake_tensor, "init_gpu_context", lambda *_: None, create=True)
    with standin(**settings) as stand, aligned, untouched, fake_tensor.FakeTensorMode(allow_non_fake_inputs=True):
        before = driver._active
        driver.set_active(_Driver(stand, launches))  # type: ignore[arg-type]
        try:
            yield stand, launches
        finally:
            driver._active = before
