"""Pickled files read without running anything that they ask for.

A pickle is a program: it names functions and calls them. Here a name stands for itself: what a file would call is
written down as `Recorded`, with what it is given, and only containers and a few constructors of the reader's own are
ever called. Arrays and tensors are made from lengths that were checked.
"""

from __future__ import annotations

import math
import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Mapping
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from torch._utils import _rebuild_tensor

Names = Mapping[tuple[str, str], Any]


class Recorded:
    """What a file says about an object: `module` and `name` of what would make it, `given` arguments, `state` set
    afterwards, `items` put into it."""

    module = name = ""

    def __new__(cls, *given: Any, **named: Any) -> Recorded:
        made = super().__new__(cls)
        made.given, made.state, made.items = (*given, *named.values()), None, []
        return made

    def __init__(self, *given: Any, **named: Any) -> None:
        self.given: tuple
        self.state: Any
        self.items: list

    def __call__(self, *given: Any, **named: Any) -> Recorded:
        return type(self)(self, *given, **named)

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def append(self, value: Any) -> None:
        """Note a value that is put into it."""
        self.items.append(value)

    def extend(self, values: Any) -> None:
        """Note values that are put into it."""
        self.items.extend(values)

    add = append

    def __repr__(self) -> str:
        return f"<{self.module}.{self.name}, not made>"


def recording(allowed: Names) -> type[pickle.Unpickler]:
    """An unpickler that calls nothing but what `allowed` holds, by (module, name)."""

    class Recorder(pickle.Unpickler):
        def __init__(self, file: BinaryIO, **options: Any) -> None:
            super().__init__(file, **options)
            self._read = file

        def load(self) -> Any:
            start = self._read.tell()
            _check_steps(self._read)
            self._read.seek(start)
            return super().load()

        def find_class(self, module: str, name: str) -> Any:
            if (module, name) in allowed:
                return allowed[module, name]
            return type(name.rpartition(".")[2] or "unnamed", (Recorded,), {"module": module, "name": name})

    return Recorder


_MOST_VALUES = 10**6
_TUPLES = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "FROZENSET")


def _check_steps(file: BinaryIO) -> None:
    """Raise UnpicklingError for steps of a pickle that take few bytes and much memory or time: Python makes room for
    all numbers up to that of an object that is remembered, and a tuple used as a key is walked through as often as it
    occurs in itself. Followed are the sizes of tuples; None marks where one begins, all else counts as one value."""
    stack: list[int | None] = []
    remembered: dict[int, int | None] = {}
    for count, (opcode, number, _) in enumerate(pickletools.genops(file)):
        name, before = opcode.name, opcode.stack_before
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            number = len(remembered) if name == "MEMOIZE" else int(number or 0)
            if number > count or not stack or stack[-1] is None:
                raise pickle.UnpicklingError(f"it remembers an object as number {number}, its step {count}")
            remembered[number] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(remembered.get(int(number or 0), 1))
        elif name == "DUP":
            stack.append(stack[-1])
        else:
            taken = 1
            if pickletools.markobject in before or (name == "POP" and stack[-1] is None):
                while (size := stack.pop()) is not None:
                    taken += size
                before = before[: before.index(pickletools.markobject)] if name != "POP" else []
            for _ in before:
                taken += stack.pop() or 0
            if name in _TUPLES and taken > _MOST_VALUES + count:
                raise pickle.UnpicklingError(f"it holds a tuple of more than {_MOST_VALUES:,} values in each other")
            kept = taken if name in _TUPLES else None if name == "MARK" else 1
            stack += [kept] * len(opcode.stack_after)


def _bytearray(*given: Any) -> bytearray:
    """A bytearray of what is there, not of a number of zeros."""
    if not all(isinstance(one, (bytes, bytearray, str)) for one in given):
        raise pickle.UnpicklingError(f"it asks for bytes of {', '.join(type(one).__name__ for one in given[:3])}")
    return bytearray(*given)


def _latin1_bytes(text: str, encoding: str) -> bytes:
    """Encode text as Python 3 writes bytes in the pickle protocol of Python 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it holds text in the encoding {encoding!r}")
    return text.encode("latin1")


_CONTAINERS: Names = {
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _latin1_bytes,
    **{(module, kind.__name__): kind for module in ("builtins", "__builtin__") for kind in (set, dict, list, complex)},
    # What is made by a call is not followed by `_check_steps`, so it is nothing that could be a key.
    **{(module, kind): list for module in ("builtins", "__builtin__") for kind in ("tuple", "frozenset")},
    **{(module, "bytearray"): _bytearray for module in ("builtins", "__builtin__")},
}


def load_recorded(file: BinaryIO) -> Any:
    """Read a pickle, text of Python 2 as Latin-1. Raises whatever reading a damaged one raises."""
    return recording(_CONTAINERS)(file, encoding="latin1").load()


_NUMBERS = {
    f"{kind}{size}" for kind, sizes in (("u", "1248"), ("i", "1248"), ("f", "248"), ("b", "1")) for size in sizes
}


def array_of(found: Any) -> np.ndarray:
    """The array of numbers that a recorded object of numpy's describes. Raises ValueError if it describes none."""
    state = getattr(found, "state", None)
    if (
        not isinstance(found, Recorded)
        or found.name != "_reconstruct"
        or not isinstance(state, tuple)
        or len(state) != 5
    ):
        raise ValueError(f"an array is needed, found {found if isinstance(found, Recorded) else type(found).__name__}")
    _, shape, dtype, by_column, content = state
    kind = dtype.given[0] if isinstance(dtype, Recorded) and dtype.name == "dtype" and dtype.given else None
    if not isinstance(kind, str) or kind not in _NUMBERS:
        raise ValueError(f"an array of numbers is needed, found one of {kind if isinstance(kind, str) else '?':.60}")
    order = dtype.state[1] if isinstance(dtype.state, tuple) and len(dtype.state) > 1 else "|"
    if isinstance(content, str):
        content = content.encode("latin1")
    whole = isinstance(shape, tuple) and all(type(side) is int and side >= 0 for side in shape)
    if not whole or not isinstance(content, bytes) or order not in ("<", ">", "|", "="):
        raise ValueError("it holds an array of an unknown form")
    numbers = np.dtype(f"{order}{kind}")
    if math.prod(shape) * numbers.itemsize != len(content):
        raise ValueError(f"it holds an array of shape {list(shape)} in {len(content)} bytes")
    return np.frombuffer(content, numbers).reshape(shape, order="F" if by_column else "C")


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    """A tensor in a storage that torch has read; raises UnpicklingError if it would reach beyond it."""
    numbers = (offset, *size, *stride)
    if not all(type(number) is int and number >= 0 for number in numbers) or len(size) != len(stride):
        raise pickle.UnpicklingError("it holds a tensor of an unknown form")
    last = offset + sum((count - 1) * step for count, step in zip(size, stride))
    if math.prod(size) and (last + 1) * storage.dtype.itemsize > storage._untyped_storage.nbytes():
        raise pickle.UnpicklingError(f"it holds a tensor of shape {list(size)} that reaches beyond its storage")
    return _rebuild_tensor(storage, offset, size, stride)


_TENSORS: Names = {
    **_CONTAINERS,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    ("torch._utils", "_rebuild_parameter_with_state"): lambda data, *_: data,
    ("torch", "Size"): list,
    ("torch.serialization", "_get_layout"): str,
}


def load_torch(path: str) -> Any:
    """Read a file of `torch.save` with its tensors on the CPU. Raises whatever reading a damaged one raises."""
    reader = ModuleType("recorded")
    reader.Unpickler = recording(_TENSORS)  # pyright: ignore[reportAttributeAccessIssue]
    reader.load = lambda file, **options: reader.Unpickler(file, **options).load()  # pyright: ignore
    return torch.load(path, map_location="cpu", pickle_module=reader, weights_only=False)
