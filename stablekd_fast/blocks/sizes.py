"""What the sizes of a network's values are while it is followed, so that Python can decide on them.

`if x.shape[1] != self.width`, `int(rows / 2)` and `len(x.shape)` do the same for every batch: they are answered from
the shapes that the values have. What depends on the number of images, or on what is in them, is not.
"""

from __future__ import annotations

import builtins
import contextlib
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import map_aggregate
from torch.fx.proxy import Attribute, TraceError

_BATCHES = (2, 3)
_UNKNOWN = object()


class Sizes:
    """The values of a graph's nodes as tensors without data, for two numbers of images; made when asked for."""

    def __init__(self, root: nn.Module, graph: fx.Graph, image_shape: tuple[int, ...]) -> None:
        self.running = False
        self._graph, self._open = graph, set[fx.Node]()
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self._mode:
            images = [torch.empty(count, *image_shape) for count in _BATCHES]
        self._images = images
        self._runs = [fx.Interpreter(root, graph=graph) for _ in _BATCHES]

    def fixed(self, node: fx.Node) -> Any:
        """The number, truth value or tuple that a node gives whatever the images are.

        Raises ValueError if it depends on the images, or is a tensor.
        """
        value = self._value(node)
        if value is _UNKNOWN or node in self._open or isinstance(value, Tensor):
            raise ValueError("it depends on the images")
        return value

    def length(self, node: fx.Node) -> int | None:
        """How many values a tuple or list holds, whatever they are; None for other values, and where it is open."""
        self._value(node)
        values = [run.env.get(node) for run in self._runs]
        lengths = {len(value) if isinstance(value, (tuple, list)) else None for value in values}
        return lengths.pop() if len(lengths) == 1 else None

    def is_tensor(self, node: fx.Node) -> bool:
        """Whether a node gives a tensor."""
        return isinstance(self._value(node), Tensor)

    def _value(self, node: fx.Node) -> Any:
        if self.running:
            return _UNKNOWN
        self.running = True
        try:
            for one in self._graph.nodes:
                if one not in self._runs[0].env:
                    self._run(one)
        finally:
            self.running = False
        return self._runs[0].env[node]

    def _run(self, node: fx.Node) -> None:
        values = [self._one(run, node, images) for run, images in zip(self._runs, self._images)]
        for run, value in zip(self._runs, values):
            run.env[node] = value
        numbers = [one for one in node.all_input_nodes if not isinstance(self._runs[0].env[one], Tensor)]
        taken = node.target is operator.getitem  # a part of a shape, which may be fixed where the whole is not
        if _UNKNOWN in values or not _alike(*values) or (not taken and any(one in self._open for one in numbers)):
            self._open.add(node)

    def _one(self, run: fx.Interpreter, node: fx.Node, images: Tensor) -> Any:
        if node.op == "placeholder":
            return images
        if any(run.env[one] is _UNKNOWN for one in node.all_input_nodes):
            return _UNKNOWN
        try:
            with self._mode, torch.no_grad():
                return run.run_node(node)
        except Exception:  # it reads data, or knows no tensors without
            return _UNKNOWN


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return True
    if isinstance(one, (tuple, list)):
        return isinstance(other, (tuple, list)) and len(one) == len(other) and all(map(_alike, one, other))
    return one is other or (type(one) is type(other) and bool(one == other))


class Value(fx.Proxy):
    """A value of a network that is followed; Python can ask it for what is the same for all images."""

    def _fixed(self) -> Any:
        try:
            return self.tracer.sizes.fixed(self.node)  # pyright: ignore[reportAttributeAccessIssue]
        except ValueError:
            raise TraceError(f"{self.node.name} decides what Python does, and it depends on the images") from None

    def __getattr__(self, name: str) -> Any:
        return _ValueAttribute(self, name)

    def __int__(self) -> int:
        return int(self._fixed())

    def __index__(self) -> int:
        return operator.index(self._fixed())

    def __float__(self) -> float:
        return float(self._fixed())

    def __len__(self) -> int:
        length = self.tracer.sizes.length(self.node)  # pyright: ignore[reportAttributeAccessIssue]
        return len(self._fixed()) if length is None else length

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


class _ValueAttribute(Value, Attribute):
    """What a followed value has under a name, such as its shape, or the method of that name."""


_MADE_BY_SIZE = ("zeros", "ones", "full", "empty", "rand", "randn", "arange", "linspace", "eye")
_TAKE_SIZES = ("expand", "repeat", "view", "reshape", "tile", "new_zeros", "new_ones", "new_full", "new_empty")


@contextlib.contextmanager
def open_sizes() -> Iterator[None]:
    """A context in which `len` of a batch is its size along the first axis, and sizes that are open can be given to
    torch's functions that make tensors, and to methods of tensors that are not followed."""
    length, functions = builtins.len, {name: getattr(torch, name) for name in _MADE_BY_SIZE}

    def of_values(given: Any, /) -> Any:
        if not isinstance(given, Value):
            return length(given)
        sizes = given.tracer.sizes  # pyright: ignore[reportAttributeAccessIssue]
        return given.size(0) if sizes.is_tensor(given.node) else length(given)

    builtins.len = of_values
    for name, function in functions.items():
        setattr(torch, name, _recorded(function, None))
    for name in _TAKE_SIZES:
        setattr(Tensor, name, _recorded(getattr(Tensor, name), name))
    try:
        yield
    finally:
        builtins.len = length
        for name, function in functions.items():
            setattr(torch, name, function)
        for name in _TAKE_SIZES:
            delattr(Tensor, name)  # torch's own lies in a class below


def _recorded(function: Callable, method: str | None) -> Callable:
    """A function, or method of a tensor, that is noted where one of its arguments is a value that is followed."""

    def called(*args: Any, **kwargs: Any) -> Any:
        found: list[Value] = []
        map_aggregate((args, kwargs), lambda one: found.append(one) if isinstance(one, Value) else None)
        if not found:
            return function(*args, **kwargs)
        kind, target = ("call_method", method) if method else ("call_function", function)
        return found[0].tracer.create_proxy(kind, target, args, kwargs)  # pyright: ignore[reportArgumentType]

    return called
