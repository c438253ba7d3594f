"""A network as a graph of operations, in which nothing is frozen that its `forward` decides anew each time.

The network is followed with `torch.fx`, in evaluation mode and once more in training mode. What differs between the two
and is only a flag handed on (`F.dropout(x, p, self.training)`) is read when the graph runs. A module that does other
things in the other mode, decides on data, draws constants at random or has hooks stays whole: the graph calls it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo import OptimizedModule
from torch.fx.node import map_aggregate
from torch.fx.proxy import TraceError

from stablekd_fast.blocks.modes import evaluation_mode, untouched
from stablekd_fast.blocks.sizes import Sizes, Value, open_sizes
from stablekd_fast.errors import CutError, first_line
from stablekd_fast.models.outputs import LogitsOf, logits_of

BY_HAND = "Pass teacher_blocks= and student_blocks= (lists of modules that compose to the model) instead of cuts."
_ROOT = "network"


class TrainingFlag(nn.Module):
    """Gives the training flag of a module of the network; `.train()` and `.eval()` of a block that holds it set it."""

    _owner: tuple[nn.Module] | None = None

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self._owner = (owner,)  # no child: its parameters are not this module's

    @property
    def training(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._owner is None or self._owner[0].training

    @training.setter
    def training(self, mode: bool) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        if self._owner is not None:
            self._owner[0].training = mode

    def forward(self) -> bool:
        return self.training


@dataclass(frozen=True)
class NetworkGraph:
    """What a network computes, from one image tensor to its logits."""

    graph: fx.Graph
    objects: dict[str, Any]
    """What the graph's nodes name: the network's own modules, parameters and buffers, and constants of its forward."""
    module_outputs: dict[str, fx.Node]
    """By module the node that it ends at."""
    whole: dict[str, str]
    """By module why it could not be followed, and stays whole."""


def follow(model: nn.Module, image_shape: tuple[int, ...]) -> NetworkGraph:
    """Follow a network for images of a shape `(3, H, W)`.

    Raises CutError, with the reason, if nothing of it can be followed.
    """
    whole: dict[str, str] = {}
    while True:
        traces = [_Trace(model, image_shape, whole, mode) for mode in (False, True)]
        found = {path: reason for one in traces for path, reason in one.whole.items() if path not in whole}
        if not found:
            found = _differences(model, *traces)
        whole |= found
        if "" in whole:
            raise CutError(f"{whole['']}, so that it cannot be cut. {BY_HAND}")
        if not found:
            return traces[0].result()


class _Images(Value):
    """The network's input: Python can branch on the size of an image, while the number of images stays open."""

    @property
    def shape(self) -> tuple:
        assert isinstance(self.tracer, _Tracer)
        return (self.size(0), *self.tracer.image_shape)


class _Tracer(fx.Tracer):
    """Follows containers, and leaves whole what cannot be followed."""

    proxy_buffer_attributes = True  # what `forward` writes to a buffer is an operation too

    def __init__(self, image_shape: tuple[int, ...], whole: dict[str, str]) -> None:
        super().__init__()
        self.image_shape, self.whole = image_shape, dict(whole)
        self.sizes: Sizes | None = None
        self.module_outputs: dict[str, fx.Node] = {}
        self.inside: list[str] = []
        self.owner: dict[fx.Node, str] = {}
        """The module whose `forward` made a node."""

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        with open_sizes():
            return super().trace(root, concrete_args)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        if self.sizes is None:
            self.sizes = Sizes(self.root, self.graph, self.image_shape)
        return _Images(node, self) if node.op == "placeholder" else Value(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        return bool(obj._fixed()) if isinstance(obj, Value) else super().to_bool(obj)

    def iter(self, obj: fx.Proxy) -> Iterator:
        try:
            return super().iter(obj)
        except TraceError:
            assert isinstance(obj, Value)
            return iter([obj[place] for place in range(len(obj))])  # pyright: ignore[reportIndexIssue]

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        running = self.sizes is not None and self.sizes.running
        return attr_val if running else super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_node(self, *args, **kwargs) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        self.owner[node] = self.inside[-1] if self.inside else ""
        return node

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        path = _own(module_qualified_name)
        childless = next(m.children(), None) is None
        if not childless and (m._forward_hooks or m._forward_pre_hooks):
            self.whole.setdefault(path, f"{_named(path, m)} has hooks, which only a call of it runs")
        return childless or path in self.whole or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m, forward, args, kwargs):
        if self.sizes is not None and self.sizes.running:
            return forward(*args, **kwargs)
        if isinstance(m, OptimizedModule):
            return m._orig_mod(*args, **kwargs)
        try:
            full = self.path_of_module(m)
        except NameError:  # made in a forward, as slices of a Sequential are: what it calls is followed
            return forward(*args, **kwargs)
        path = _own(full)
        before, stack = set(self.graph.nodes), dict(self.module_stack)
        self.inside.append(path)
        try:
            result = super().call_module(m, forward, args, kwargs)
        except Exception as error:
            # Take back what was made of it, and call it whole.
            for node in reversed(list(self.graph.nodes)):
                if node not in before:
                    self.graph.erase_node(node)
            self.module_stack.clear()
            self.module_stack.update(stack)
            reason = first_line(error)
            self.whole[path] = f"{_named(path, m)} cannot be followed ({reason})"
            result = self.create_proxy("call_module", full, args, kwargs)
        finally:
            self.inside.pop()
        carried = logits_of(result)  # of several values, such as features to look at, the network goes on with this
        if isinstance(carried, fx.Proxy):
            self.module_outputs[path] = carried.node
        return result


def _own(path: str) -> str:
    """The path of a module in the network itself."""
    return path.removeprefix(_ROOT).removeprefix(".")


def _named(path: str, module: nn.Module) -> str:
    return f"{path} ({type(module).__name__})" if path else type(module).__name__


@dataclass
class _Trace:
    """A network followed in one mode."""

    model: nn.Module
    image_shape: tuple[int, ...]
    known: dict[str, str]
    training: bool
    constants: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tracer, holder = _Tracer(self.image_shape, self.known), LogitsOf(self.model)
        with untouched(self.model), evaluation_mode(self.model):
            torch.manual_seed(int(self.training))  # constants that are drawn at random differ
            self.model.train(self.training)
            with _not_compiled(self.model), _own_state(self.model, self.tracer.whole):
                self.graph = self.tracer.trace(holder)
        self.whole = {path: reason for path, reason in self.tracer.whole.items() if path not in self.known}
        for node in self.graph.nodes:
            if node.op == "get_attr" and not node.target.startswith(f"{_ROOT}."):
                self.constants[node.target] = getattr(holder, node.target)
            elif node.op in ("get_attr", "call_module"):
                node.target = _own(node.target)
        _drop_unused(self.graph)

    def result(self) -> NetworkGraph:
        objects = {}
        for node in self.graph.nodes:
            if node.op == "get_attr":
                kept = self.constants.get(node.target)
                objects[node.target] = attrgetter(node.target)(self.model) if kept is None else kept
            elif node.op == "call_module":
                objects[node.target] = node.meta.get("flag") or self.model.get_submodule(node.target)
        return NetworkGraph(self.graph, objects, self.tracer.module_outputs, self.tracer.whole)


@contextlib.contextmanager
def _not_compiled(model: nn.Module) -> Iterator[None]:
    """A context in which modules that `Module.compile` compiled in place run as they were written."""
    compiled = {module: module._compiled_call_impl for module in model.modules() if module._compiled_call_impl}
    for module in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call


@contextlib.contextmanager
def _own_state(model: nn.Module, whole: dict[str, str]) -> Iterator[None]:
    """A context after which modules hold what they held before. One that keeps values between calls stays whole; what
    the network itself notes on the way, such as features to look at, is left to it alone."""
    kinds = ("_parameters", "_buffers", "_modules")
    plain = [(path, module) for path, module in model.named_modules() if not isinstance(module, torch.jit.ScriptModule)]
    before = {path: (module, dict(vars(module))) for path, module in plain}
    parts = {path: [dict(held[kind]) for kind in kinds] for path, (_, held) in before.items()}
    try:
        yield
    finally:
        for path, (module, held) in before.items():
            now = {name: value for name, value in vars(module).items() if name not in _HOLDERS}
            if path and any(value is not held.get(name) for name, value in now.items()):
                whole.setdefault(path, f"{_named(path, module)} keeps values between calls")
            vars(module).clear()
            vars(module).update(held)
            for kind, part in zip(kinds, parts[path]):
                held[kind].clear()
                held[kind].update(part)


_HOLDERS = {"training", "_parameters", "_buffers", "_modules", "_is_full_backward_hook"}


def _drop_unused(graph: fx.Graph) -> None:
    """Remove nodes on which the logits do not depend, such as features that are returned beside them, but none that may
    change a value that others use."""
    for node in reversed(graph.nodes):
        if node.op not in ("placeholder", "output") and not node.users and not _writes(node):
            graph.erase_node(node)


def _writes(node: fx.Node) -> bool:
    """Whether an operation is one that by its name changes what it is given."""
    name = getattr(node.target, "__name__", str(node.target))
    if node.op not in ("call_method", "call_function"):
        return False
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name == "setitem" or bool(node.kwargs.get("inplace")) or "out" in node.kwargs


def _differences(model: nn.Module, evaluated: _Trace, trained: _Trace) -> dict[str, str]:
    """Compare a network's two traces: which modules must stay whole, and why. Flags that are handed on are replaced by
    nodes that read them."""
    pairs = list(zip_longest(evaluated.graph.nodes, trained.graph.nodes))
    same = dict(pairs)
    for ours, theirs in pairs:
        if ours is None or theirs is None or not _alike(ours, theirs, same):
            reason = "does different things in train and eval mode"
            return _whole_class(model, _culprit(model, (evaluated, ours), (trained, theirs)), reason)
        if ours.op == "get_attr" and ours.target in evaluated.constants:
            values = evaluated.constants[str(ours.target)], trained.constants[str(theirs.target)]
            if isinstance(values[0], Tensor) and not torch.equal(*values):
                return _whole_class(model, evaluated.tracer.owner[ours], "draws numbers at random")
    for ours, theirs in pairs:
        _read_flags(model, evaluated, ours, theirs)
    return {}


def _alike(ours: fx.Node, theirs: fx.Node, same: dict) -> bool:
    """Whether two nodes do the same to the same values, flags aside."""
    if ours.op != theirs.op or (ours.target != theirs.target and ours.op != "get_attr"):
        return False
    operands = _operands(ours), _operands(theirs)
    return len(operands[0]) == len(operands[1]) and all(
        same.get(mine) is other if isinstance(mine, fx.Node) else mine == other or (mine, other) == (False, True)
        for mine, other in zip(*operands)
    )


def _given(node: fx.Node) -> tuple:
    """A node's arguments, and those with names in the order of these."""
    return node.args, tuple(sorted(node.kwargs.items()))


def _operands(node: fx.Node) -> list:
    """All that a node is given, in order, names of arguments included."""
    found: list = []
    map_aggregate(_given(node), lambda value: found.append(value))  # pyright: ignore
    return found


def _culprit(model: nn.Module, *sides: tuple[_Trace, fx.Node | None]) -> str:
    """The innermost module to whose `forward` one of two nodes belongs that differ."""
    paths = []
    for trace, node in sides:
        if node is not None:
            path = trace.tracer.owner[node]
            paths.append(path.rpartition(".")[0] if node.op == "call_module" else path)
    path = max(paths, key=lambda path: path.count(".") + bool(path))
    while path and type(model.get_submodule(path)) is nn.Sequential:  # never differs by itself
        path = path.rpartition(".")[0]
    return path


def _whole_class(model: nn.Module, path: str, reason: str) -> dict[str, str]:
    """Leave a module whole, and all others of its class, which have the same `forward`."""
    kind = type(model.get_submodule(path))
    alike = {name: module for name, module in model.named_modules() if type(module) is kind}
    return {name: f"{_named(name, module)} {reason}" for name, module in alike.items()}


def _read_flags(model: nn.Module, trace: _Trace, ours: fx.Node | None, theirs: fx.Node | None) -> None:
    """Where a node is given False in evaluation and True in training, give it the flag of the module that says so."""
    assert ours is not None and theirs is not None
    operands = iter(_operands(theirs))
    if not any(mine is False and other is True for mine, other in zip(_operands(ours), _operands(theirs))):
        return
    path = trace.tracer.owner[ours]
    owner = model.get_submodule(path)
    with trace.graph.inserting_before(ours):
        flag = trace.graph.call_module(f"training_flag_{ours.name}")
    flag.meta["flag"] = TrainingFlag(owner)

    def chosen(value: Any) -> Any:
        return flag if next(operands) is True and value is False else value

    args, named = map_aggregate(_given(ours), chosen)  # pyright: ignore
    ours.args, ours.kwargs = args, dict(named)
