"""Whether products of float32 tensors on a GPU may use tensor cores (TF32), said in the ways that torch has for it.

Older versions have two switches, `allow_tf32`. Since 2.9 each library has a setting `fp32_precision` as well, which
inherits from wider ones; the switches raise an error where they contradict it. Both ways are kept in step here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

_UNSET = "none"
"""What a setting reads that follows the wider one."""


@contextlib.contextmanager
def tensor_cores(device: torch.device, allowed: bool) -> Iterator[None]:
    """A context that allows or forbids TF32 on `device`, a GPU; what the process had set before comes back afterwards,
    in whichever way it was set. On a CPU it does nothing."""
    if device.type != "cuda":
        yield
        return
    switches_back, kinds = _switches(), _settings()
    try:
        torch.set_float32_matmul_precision("high" if allowed else "highest")
        torch.backends.cudnn.allow_tf32 = allowed
        for setting in (setting for kind in kinds if kind.on_gpu for setting in kind.settings):
            setting.fp32_precision = "tf32" if allowed else "ieee"  # the switches leave some to what they inherit
        yield
    finally:
        switches_back()
        for kind in kinds:
            kind.put_back()


class _Settings:
    """Settings that follow `wider` ones where they are not set, and what they are now."""

    def __init__(self, settings: list[Any], *wider: Any, on_gpu: bool = True) -> None:
        self.settings, self.on_gpu = settings, on_gpu
        self._before = [setting.fp32_precision for setting in settings]
        self._inherited = next((one.fp32_precision for one in wider if one.fp32_precision != _UNSET), "")

    def put_back(self) -> None:
        """Make the settings what they were; one that agreed with what it inherits goes on to follow it."""
        for setting, value in zip(self.settings, self._before):
            setting.fp32_precision = _UNSET if value == self._inherited else value


def _settings() -> list[_Settings]:
    """The settings of a GPU's products and convolutions, and those of a CPU's products, which the first switch changes
    too; none where torch has only the switches."""
    backends: Any = torch.backends
    if not hasattr(backends.cuda.matmul, "fp32_precision"):
        return []
    return [
        _Settings([backends.cuda.matmul], backends),
        _Settings([backends.cudnn.conv, backends.cudnn.rnn], backends.cudnn, backends),
        _Settings([backends.mkldnn.matmul], backends.mkldnn, backends, on_gpu=False),
    ]


def _switches() -> Callable[[], None]:
    """How to put the switches back. One that contradicts a setting cannot be read, and still has its default."""
    try:
        products = torch.get_float32_matmul_precision()
    except RuntimeError:
        products = "highest"
    try:
        convolutions = torch.backends.cudnn.allow_tf32
    except RuntimeError:
        convolutions = True

    def put_back() -> None:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions

    return put_back
