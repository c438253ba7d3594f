"""Every operation of a loop on fake CUDA tensors: how many there are, what they move, and which of them would make the
host wait for the device."""

from __future__ import annotations

import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SMALL_COPY = 64 << 10
"""Bytes up to which a copy from pageable memory is nothing to speak of: the driver stages it at once."""

_aten = torch.ops.aten
_READING = {
    _aten._local_scalar_dense,
    _aten.nonzero,
    _aten.masked_select,
    _aten.equal,
    _aten.unique_dim,
    _aten._unique2,
}
_INDEXING = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_}
_VIEWS = {"view", "transpose", "t", "permute", "expand", "slice", "select", "detach", "unsqueeze", "squeeze", "split"}


@dataclass(frozen=True)
class Refusal:
    """An operation at which the host waits for the device, and the line of the package that asks for it."""

    what: str
    place: str


@dataclass
class Traffic(TorchDispatchMode):
    """A mode that counts operations on fake CUDA tensors, and notes where the host would wait for the device: values
    read on the host, and copies between the device and pageable memory."""

    package: str = "stablekd_fast"
    operations: Counter[str] = field(default_factory=Counter)
    """How often each was dispatched on the device; views are left out."""
    moved: int = 0
    """Bytes of tensors read and written on the device."""
    shipped: int = 0
    """Bytes copied between host and device."""
    refusals: Counter[Refusal] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        reason = self._reason(function, args, kwargs)
        if reason:
            self.refusals[Refusal(reason, self._place())] += 1
        result = function(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        if any(tensor.is_cuda for tensor in tensors) and function.__name__.split(".")[0] not in _VIEWS:
            self.operations[str(function.overloadpacket)] += 1
            self.moved += sum(tensor.nbytes for tensor in tensors if tensor.is_cuda)
        return result

    def _reason(self, function, args: tuple, kwargs: dict) -> str | None:
        packet = function.overloadpacket
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if packet in _READING and any(tensor.is_cuda for tensor in given):
            return f"{packet} reads a value on the host"
        if packet in _INDEXING and args[0].is_cuda:
            masks = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
            return f"{packet} by a mask asks how many elements it chooses" if masks else None
        if packet is _aten._to_copy:
            source, target = args[0], torch.device(kwargs.get("device") or args[0].device)
            return self._copy(source, target, source.nbytes, False, kwargs.get("non_blocking", False))
        if packet is _aten.copy_:
            target, source = args[:2]
            waits_not = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            pinned = not target.is_cuda and source.is_cuda and target.is_pinned()
            return self._copy(source, target.device, source.nbytes, pinned, waits_not)
        return None

    def _copy(self, source: Tensor, target: torch.device, size: int, into_pinned: bool, waits_not: bool) -> str | None:
        if (source.device.type == "cuda") == (target.type == "cuda"):
            return None
        self.shipped += size
        if target.type == "cpu":
            return None if into_pinned and waits_not else "a copy to pageable memory waits for the device"
        if size <= SMALL_COPY or (source.is_pinned() and waits_not):
            return None
        return f"a copy of more than {SMALL_COPY >> 10} KB comes from pageable memory"

    def _place(self) -> str:
        """The innermost line of the package under way, as `room/file.py:function`."""
        for frame in reversed(traceback.extract_stack()):
            parts = Path(frame.filename).parts
            if "standin" in parts or not (self.package in parts or "kernels" in parts):
                continue
            return f"{'/'.join(parts[-2:])}:{frame.name}"
        return "elsewhere"
