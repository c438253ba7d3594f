"""The number formats in which forward passes compute. Weights, batch-norm statistics, losses, updates stay float32."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from stablekd_fast.errors import ConfigError
from stablekd_fast.execution.tensor_cores import tensor_cores

PRECISIONS = ("auto", "fp32", "tf32", "bf16", "fp16")
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_TRIALS = 3
_WORTH_IT = 1.2
"""How many times faster bf16 must be on a CPU: a smaller gain is not worth other numbers, and might be noise."""


@dataclass(frozen=True)
class Precision:
    """`fp32`; `tf32` (float32 with tensor cores, CUDA only); `bf16` and `fp16` by torch's autocast.

    `reason` says why this precision was chosen, where the user left the choice open.
    """

    name: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    reason: str = ""

    @property
    def scales_loss(self) -> bool:
        """Whether the loss is scaled; float16 gradients would underflow otherwise."""
        return self.name == "fp16"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype to which convolutions and products cast their operands."""
        return _AUTOCAST.get(self.name, torch.float32)

    def products(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        """A context in which products of float32 tensors are taken as this precision says.

        Backward passes need it too, since they choose anew: cuDNN's default is TF32.
        """
        return tensor_cores(device, self.name != "fp32")

    @contextlib.contextmanager
    def applied(self, device: torch.device) -> Iterator[None]:
        """A context in which forward passes on `device` compute in this precision; a capture may enter it."""
        with self.products(device):
            if self.dtype is torch.float32:
                yield
                return
            # No cache of cast weights: a graph's replay would meet the one that was cast when it was captured.
            with torch.autocast(device.type, self.dtype, cache_enabled=False):
                yield


FP32 = Precision()


def pick_precision(name: str, device: torch.device, trial: Callable[[Precision], float]) -> Precision:
    """The precision called `name`.

    `auto` is bf16 on a GPU that has it, fp16 on one that has not. On a CPU it is bf16 if the CPU has it and `trial`,
    which gives the seconds of a pass in a precision, gives clearly fewer for it; else fp32. Raises ConfigError if the
    device cannot compute in the precision that was asked for.
    """
    if name not in PRECISIONS:
        raise ConfigError(f"precision={name!r} was given; choose one of {', '.join(PRECISIONS)}.")
    if name == "tf32" and device.type != "cuda":
        raise ConfigError(f"precision=tf32 was given, but {device.type} has no TF32; choose fp32, bf16 or auto.")
    if name != "auto":
        return Precision(name)
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return Precision("bf16", "the GPU computes in bf16")
        return Precision("fp16", "the GPU has tensor cores for fp16, none for bf16")
    if not cpu_has_bf16():
        return Precision("fp32", "the CPU has no bf16 instructions")
    taken = {name: trial(Precision(name)) for name in ("fp32", "bf16")}
    measured = ", ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in taken.items())
    better = taken["fp32"] >= _WORTH_IT * taken["bf16"]
    return Precision("bf16" if better else "fp32", f"student forward and backward: {measured}")


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 in hardware (AVX-512 BF16 or AMX)."""
    checks = [getattr(torch.cpu, f"_is_{feature}_supported", None) for feature in ("avx512_bf16", "amx_tile")]
    return any(check is not None and check() for check in checks)


def seconds_per_pass(precision: Precision, student: nn.Module, images: Tensor) -> float:
    """The fewest seconds of a few forward and backward passes. Buffers and gradients are left as they were."""
    buffers = {name: buffer.clone() for name, buffer in student.named_buffers()}
    taken = []
    for _ in range(_TRIALS + 1):
        start = time.perf_counter()
        with precision.applied(images.device):
            output = student(images)
        torch.autograd.grad(output.float().square().mean(), [p for p in student.parameters() if p.requires_grad])
        taken.append(time.perf_counter() - start)
    for name, buffer in student.named_buffers():
        buffer.copy_(buffers[name])
    return min(taken[1:])


class LossScale:
    """The dynamic loss scale of float16 training, wholly on the device: nothing is read back, so it can be captured.

    Gradients are multiplied by `scale` before backward and divided by it before the update. A step whose gradients are
    not finite is skipped (`skipped` is 1) and halves the scale; `interval` good steps in a row double it.
    """

    def __init__(self, device: torch.device, initial: float = 2.0**16, interval: int = 2000) -> None:
        self.interval = interval
        self.scale = torch.full((), initial, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int32, device=device)
        self.skipped = torch.zeros((), device=device)

    def take_off(self, gradients: list[Tensor]) -> None:
        """Divide gradients by the scale, in place, and note in `skipped` whether one is not finite."""
        self.skipped.zero_()
        torch._amp_foreach_non_finite_check_and_unscale_(gradients, self.skipped, self.scale.reciprocal())

    def update(self) -> None:
        """Halve the scale after a skipped step, double it after `interval` good ones."""
        torch._amp_update_scale_(self.scale, self.good_steps, self.skipped, 2.0, 0.5, self.interval)

    def state(self) -> dict[str, Tensor]:
        """The tensors that a resumed run needs."""
        return {"scale": self.scale, "good_steps": self.good_steps}
