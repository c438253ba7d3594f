"""What the sizes of a network's values are while it is followed, so that Python can decide on them.

`if x.shape[1] != self.width`, `int(rows / 2)` and `len(x.shape)` do the same for every batch: they are answered from
the shapes that the values have. What depends on the number of images, or on what is in them, is not.
"""

from __future__ import annotations

import builtins
import contextlib
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.proxy import TraceError

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

    def __int__(self) -> int:
        return int(self._fixed())

    def __index__(self) -> int:
        return operator.index(self._fixed())

    def __float__(self) -> float:
        return float(self._fixed())

    def __len__(self) -> int:
        return len(self._fixed())

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


@contextlib.contextmanager
def open_lengths() -> Iterator[None]:
    """A context in which `len` of a batch is its size along the first axis, which stays open."""
    length = builtins.len

    def of_values(given: Any, /) -> Any:
        if not isinstance(given, Value):
            return length(given)
        sizes = given.tracer.sizes  # pyright: ignore[reportAttributeAccessIssue]
        return given.size(0) if sizes.is_tensor(given.node) else length(given)

    builtins.len = of_values
    try:
        yield
    finally:
        builtins.len = length
