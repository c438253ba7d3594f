"""Memory: how the C library keeps it between steps, what is said when none is left, and how networks lie in it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from stablekd_fast.errors import TrainingError

_REFUSALS = ("can't allocate memory", "could not create a primitive", "could not create a memory object")
"""What torch's allocator for the CPU and oneDNN say when they get no memory."""


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory: by default every large tensor is mapped and faulted in anew.

    Returns whether this C library can be told so.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    trim_threshold, mmap_threshold, one_gigabyte = -1, -3, 1 << 30
    return all([mallopt(mmap_threshold, one_gigabyte), mallopt(trim_threshold, one_gigabyte)])


def left(device: torch.device) -> int | None:
    """Return how many bytes of memory are left on a device to this process; None where the system does not tell.

    In main memory that is the least of what the machine and the process's control group (a container) have left.
    """
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError, AssertionError):  # no driver, which the stand-in does without
            return torch.cuda.mem_get_info(device)[0]
        return None
    told = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        told.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]))
    with contextlib.suppress(OSError, ValueError):  # the limit is a number, or `max`
        group = Path("/sys/fs/cgroup")
        told.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return min(told, default=None)


@contextlib.contextmanager
def watched(place: Callable[[], str], batch_size: int) -> Iterator[None]:
    """A context that raises TrainingError, naming the place and what to try, where memory runs out in it."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not isinstance(error, torch.OutOfMemoryError) and not any(refusal in text for refusal in _REFUSALS):
            raise
        size = re.search(r"allocate ([\d.]+ ?\w*)", text.replace("allocate memory", ""))
        raise TrainingError(
            f"Out of memory in {place()}: could not allocate {size.group(1) if size else 'memory'} with batch size "
            f"{batch_size}. Try --batch-size {max(batch_size // 2, 1)}."
        ) from error


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """A context in which Python's garbage collector does not run by itself."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def placed(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a network to the device, with convolution weights in channels-last memory.

    On CPUs, strided 1x1 convolutions of fewer than 16 channels, as stems have them, are left aside and get their input
    channels first: oneDNN's backward of the other form writes where it must not (seen with torch 2.14).
    """
    model = model.to(device).to(memory_format=torch.channels_last)
    for module in model.modules() if device.type == "cpu" else ():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) != module.stride and module.in_channels < 16:
            module.weight.data = module.weight.data.clone(memory_format=torch.contiguous_format)
            if _channels_first not in module._forward_pre_hooks.values():
                module.register_forward_pre_hook(_channels_first)
    return model


def _channels_first(_: nn.Module, given: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    return (given[0].contiguous(),)
