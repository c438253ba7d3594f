"""Every operation of a loop on fake CUDA tensors: how many there are, what they move, and which of them would make the
host wait for the device."""

from __future__ import annotations

import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stablekd_fast.execution.emulator import INDEXING, by_mask

SMALL_COPY = 64 << 10
"""Bytes up to which a copy from pageable memory is nothing to speak of: the driver stages it at once."""

_aten = torch.ops.aten
_READING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_NO_WORK = {"view", "transpose", "t", "permute", "expand", "slice", "select", "detach", "unsqueeze", "squeeze", "split"}
_NO_WORK |= {"device", "empty", "empty_like", "empty_strided"}
_NEVER_FAKE = {_aten._fused_adamw_, _aten._fused_adam_, _aten._fused_sgd_}
"""Operations that torch has no fake form of. They change their operands, and return nothing."""


@dataclass(frozen=True)
class Refusal:
    """An operation at which the host waits for the device, and the line of the package that asks for it."""

    what: str
    place: str


@dataclass(frozen=True)
class Shipment:
    """One way to copy between host and device."""

    to_device: bool
    pinned: bool
    """Whether the memory on the host is pinned, so that the host need not wait."""
    apart: bool
    """Whether the copy goes on another stream than the one that computes."""


@dataclass
class Traffic(TorchDispatchMode):
    """A mode that counts operations on fake CUDA tensors, and notes where the host would wait for the device (values
    read on the host, copies between the device and pageable memory), and copies on another stream than the one that was
    current when the mode was first entered. It is entered within `standin`, which knows streams."""

    operations: Counter[str] = field(default_factory=Counter)
    """How often each was dispatched on the device; those that give it no work are left out."""
    moved: int = 0
    """Bytes of tensors read and written on the device."""
    shipped: int = 0
    """Bytes copied between host and device."""
    refusals: Counter[Refusal] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        super().__init__()
        self._pinned: set[StorageWeakRef] = set()
        self._stream: object = None

    def __enter__(self):
        self._stream = self._stream or torch.cuda.current_stream()
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        packet, pins = function.overloadpacket, kwargs.pop("pin_memory", None)
        reason = self._reason(function, args, kwargs)
        if reason:
            self.refusals[Refusal(reason, self._place())] += 1
        if packet is _aten._local_scalar_dense:
            return 1  # there is no value; loops that ask whether all is well are told so
        if packet is _aten.equal:
            return True
        if packet in _NEVER_FAKE:
            result = None
        else:
            result = args[0].clone() if packet is _aten._pin_memory else function(*args, **kwargs)
        if pins or packet is _aten._pin_memory:
            self._pinned.add(_memory(result))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        if any(tensor.is_cuda for tensor in tensors) and packet.__name__ not in _NO_WORK:
            self.operations[packet.__name__] += 1
            self.moved += sum(tensor.nbytes for tensor in tensors if tensor.is_cuda)
            self.note(function, args, kwargs, result)
        return result

    def note(self, function: torch._ops.OpOverload, args: tuple, kwargs: dict, result: Any) -> None:
        """Called with every operation that gives the device work, after it was dispatched."""

    def ship(self, shipment: Shipment, nbytes: int) -> None:
        """Called with every copy between host and device, before it is dispatched."""

    def _reason(self, function, args: tuple, kwargs: dict) -> str | None:
        packet = function.overloadpacket
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if packet in INDEXING and args[0].is_cuda:
            return f"{packet.__name__} by a mask asks how many elements it chooses" if by_mask(args) else None
        if _READING & set(function.tags) and any(tensor.is_cuda for tensor in given):
            return f"{packet.__name__} reads a value on the host"
        if packet is _aten._to_copy:
            target = torch.device(kwargs.get("device") or args[0].device)
            return self._copy(args[0], target, kwargs.get("non_blocking", False), into_pinned=False)
        if packet is _aten.copy_:
            target, source, *rest = args
            waits_not = rest[0] if rest else kwargs.get("non_blocking", False)
            return self._copy(source, target.device, waits_not, into_pinned=_memory(target) in self._pinned)
        return None

    def _copy(self, source: Tensor, target: torch.device, waits_not: bool, *, into_pinned: bool) -> str | None:
        if (source.device.type == "cuda") == (target.type == "cuda"):
            return None
        self.shipped += source.nbytes
        apart = torch.cuda.current_stream() != self._stream
        pinned = into_pinned if target.type == "cpu" else _memory(source) in self._pinned
        self.ship(Shipment(target.type == "cuda", pinned, apart), source.nbytes)
        if apart:
            return "a copy goes on another stream than the loop's work, which does not wait for it"
        if target.type == "cpu":
            return None if into_pinned and waits_not else "a copy to pageable memory waits for the device"
        if source.nbytes <= SMALL_COPY or (pinned and waits_not):
            return None
        return f"a copy of more than {SMALL_COPY >> 10} KB comes from pageable memory"

    def _place(self) -> str:
        """The innermost line of the package under way, as `room/file.py:function`."""
        for frame in reversed(traceback.extract_stack()):
            parts = Path(frame.filename).parts
            if frame.name.startswith("<") or "standin" in parts or not {"stablekd_fast", "kernels"} & set(parts):
                continue
            return f"{'/'.join(parts[-2:])}:{frame.name}"
        return "elsewhere"


def _memory(tensor: Tensor) -> StorageWeakRef:
    """What is the same for all views of one piece of memory, and for no other piece, even after its end."""
    return StorageWeakRef(tensor.untyped_storage())
