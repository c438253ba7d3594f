"""A graph emulator: records the operations that a step dispatches, and replays them alone.

As in a CUDA graph, every tensor stays at the address where the recording met it, every Python number is frozen, and no
Python of the step runs again. A step that replays to other numbers than it computes eagerly would do so on a GPU too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stablekd_fast.errors import CaptureError

_UNCAPTURABLE = {
    torch.Tag.data_dependent_output: "it reads a tensor's value on the host",
    torch.Tag.dynamic_output_shape: "a shape depends on a tensor's values",
}
INDEXING = {torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_, torch.ops.aten._index_put_impl_}
"""Operations that read the device on the host where an index is a mask, to learn how many elements it chooses."""
_WITHOUT_CONTENTS = {torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.empty_strided}


@dataclass(frozen=True)
class Operation:
    """One dispatched operation with the very tensors that it read and wrote."""

    function: torch._ops.OpOverload
    args: tuple
    kwargs: dict[str, Any]
    result: Any

    @property
    def inputs(self) -> list[Tensor]:
        return _tensors((self.args, self.kwargs))

    @property
    def outputs(self) -> list[Tensor]:
        return _tensors(self.result)


class Watch(TorchDispatchMode):
    """Lets operations through as long as a graph could repeat them, and raises CaptureError at the first other one."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        reason = _why_not(function, args, kwargs)
        if reason:
            raise CaptureError(f"{function} cannot be captured: {reason}.")
        result = function(*args, **kwargs)
        self.note(Operation(function, args, kwargs, result))
        return result

    def note(self, operation: Operation) -> None:
        """Called with every operation, after it ran."""


def _why_not(function: torch._ops.OpOverload, args: tuple, kwargs: dict) -> str | None:
    """Why a graph could not repeat the operation; None if it could."""
    if function.overloadpacket in INDEXING:
        return _UNCAPTURABLE[torch.Tag.dynamic_output_shape] if by_mask(args) else None
    for tag, reason in _UNCAPTURABLE.items():
        if tag in function.tags:
            return reason
    if function is torch.ops.aten._to_copy.default:
        source, target = args[0].device, torch.device(kwargs.get("device") or args[0].device)
        if target.type == "cpu" and source.type != "cpu":
            return "it copies a tensor from the device to the host"
        return _crossing(source, target, kwargs.get("non_blocking", False))
    if function is torch.ops.aten.copy_.default:
        target, source, *rest = args
        return _crossing(source.device, target.device, rest[0] if rest else kwargs.get("non_blocking", False))
    return None


def by_mask(args: tuple) -> bool:
    """Whether the arguments of one of `INDEXING` choose elements by a mask."""
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])


def _crossing(source: torch.device, target: torch.device, non_blocking: bool) -> str | None:
    """Why a copy cannot be captured: between host and device the host waits, unless it was told not to."""
    if non_blocking or (source.type == "cpu") == (target.type == "cpu"):
        return None
    return f"it copies a tensor from {source.type} to {target.type} and waits"


class Recording(Watch):
    """Keeps the operations that run while it is entered, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def note(self, operation: Operation) -> None:
        self.operations.append(operation)


def replay(operations: list[Operation]) -> None:
    """Run recorded operations again, and nothing else; every result is put where the recorded one lies.

    Views stay views, and memory without defined contents stays as it is.
    """
    with torch.no_grad():
        for operation in operations:
            if operation.function.overloadpacket in _WITHOUT_CONTENTS:
                continue
            inputs = {tensor.untyped_storage().data_ptr() for tensor in operation.inputs}
            targets = [None if out.untyped_storage().data_ptr() in inputs else out for out in operation.outputs]
            if any(target is not None for target in targets) or operation.function._schema.is_mutable:
                found = _tensors(operation.function(*operation.args, **operation.kwargs))
                for target, value in zip(targets, found, strict=True):
                    if target is not None:
                        target.copy_(value)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
