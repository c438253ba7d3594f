"""Find the places where one tensor carries a whole network, and split the network there.

Blocks refer to the network's own submodules and parameters. What depends on the sizes of images alone, such as masks
and rotary embeddings, is made anew in each block that needs it; what a block would overwrite of its input is copied
first.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from stablekd_fast.blocks.check import check_runs
from stablekd_fast.blocks.graph import NetworkGraph, TrainingFlag, follow
from stablekd_fast.blocks.layout import Layout, layout_of
from stablekd_fast.blocks.modes import evaluation_mode, untouched

UNNAMED = 1_000
"""The depth of a cut point at which no module ends."""


@dataclass(frozen=True)
class CutPoint:
    """A value that alone carries the network: everything later depends on the input through it only."""

    name: str
    aliases: tuple[str, ...]
    node: fx.Node
    layout: Layout
    flops: int
    """FLOPs per image from the input up to here."""
    depth: int
    """How deep in the tree of modules the outermost one that ends here lies; `UNNAMED` where none ends."""
    divides: str | None = None
    """A parameter that is used before and after it; None where there is none."""


@dataclass(frozen=True)
class TracedNetwork:
    """A network's graph with its cut points in the order of execution."""

    root: nn.Module
    followed: NetworkGraph
    values: Values
    points: tuple[CutPoint, ...]
    flops: int
    """FLOPs of the whole network per image (multiply-add counted as two)."""

    @property
    def graph(self) -> fx.Graph:
        """From the images to the logits."""
        return self.followed.graph

    @property
    def whole(self) -> dict[str, str]:
        """By module why it could not be followed, and stays whole."""
        return self.followed.whole

    def split(self, points: list[CutPoint]) -> list[fx.GraphModule]:
        """The network as `len(points) + 1` modules that compose to it and share its parameters."""
        nodes = list(self.graph.nodes)
        position = {node: i for i, node in enumerate(nodes)}
        entry = next(node for node in nodes if node.op == "placeholder")
        borders = [entry, *(point.node for point in points), _last(self.graph)]
        return [
            self._segment(nodes[position[first] + 1 : position[last] + 1], first, last)
            for first, last in itertools.pairwise(borders)
        ]

    def _segment(self, nodes: list[fx.Node], entry: fx.Node, exit_node: fx.Node) -> fx.GraphModule:
        """A module of the given nodes, which map the value of `entry` to that of `exit_node`."""
        graph = fx.Graph()
        given = graph.placeholder("x")
        copies: dict[fx.Node, Any] = {entry: given}
        if any(entry in self.values.changed.get(node, ()) for node in nodes):
            copies[entry] = graph.call_method("clone", (given,))

        def copied(node: fx.Node) -> Any:
            if node not in copies:
                copies[node] = self._made_anew(graph, node, given, copied)
            return copies[node]

        for node in nodes:
            if node.op not in ("placeholder", "output") and node not in self.values.free:
                copies[node] = graph.node_copy(node, copied)
        graph.output(copied(exit_node))
        objects = self.followed.objects
        segment = fx.GraphModule({name: objects[name] for name in _named_in(graph)}, graph)
        segment.training = self.root.training
        self._share_buffers(segment)
        return segment

    def _share_buffers(self, segment: fx.GraphModule) -> None:
        """Buffers that a segment reads by themselves stay their module's: a move to another device or type gives a
        module new ones, and both must see them."""
        buffers = dict(self.root.named_buffers(remove_duplicate=False))
        for name in _named_in(segment.graph):
            owner, holder = (module.get_submodule(name.rpartition(".")[0]) for module in (self.root, segment))
            if name in buffers and holder is not owner:
                holder._buffers = owner._buffers
                holder._non_persistent_buffers_set = owner._non_persistent_buffers_set

    def _made_anew(self, graph: fx.Graph, node: fx.Node, given: fx.Node, copied) -> Any:
        """What depends on no image, made from the number of images that a block is `given`."""
        if _is_device(node):
            return graph.call_function(getattr, (given, "device"))
        if node not in self.values.sizes:
            return graph.node_copy(node, copied)

        def size(fixed: int, per_image: int) -> Any:
            if not per_image:
                return fixed
            count = graph.call_method("size", (given, 0))
            return count if per_image == 1 else graph.call_function(operator.mul, (count, per_image))

        return _mapped(lambda pair: size(*pair), self.values.sizes[node])


def trace(model: nn.Module, example_input: torch.Tensor) -> TracedNetwork:
    """Trace `model` on `example_input` `[N, ...]` and list its cut points.

    Raises CutError where the network cannot be followed, ModelError where it cannot compute such images at all.
    """
    try:
        followed = follow(model, tuple(example_input.shape[1:]))
        values = _measured(model, followed, example_input)
    except Exception:
        check_runs(model, example_input)  # says what the network itself cannot do
        raise
    if len(values.shapes.get(_last(followed.graph), ())) != 1:
        check_runs(model, example_input)
    aliases: dict[fx.Node, list[str]] = {}
    for path, node in followed.module_outputs.items():
        aliases.setdefault(node, []).append(path)

    carriers, shared = _single_carriers(followed.graph, values), _shared(followed)
    points, flops = [], 0
    for place, node in enumerate(followed.graph.nodes):
        flops += values.flops.get(node, 0)
        if node in carriers and node in values.shapes:
            modules = sorted((path for path in aliases.get(node, []) if path), key=lambda path: (path.count("."), path))
            names = tuple(modules) or (node.name,)
            depth = names[0].count(".") if modules else UNNAMED
            axis = _channel_axis(model, node, values.shapes)
            layout = layout_of(values.shapes[node], axis, tuple(example_input.shape[2:]))
            divides = next((name for name, (first, last) in shared.items() if first <= place < last), None)
            points.append(CutPoint(names[0], names, node, layout, flops, depth, divides))
    return TracedNetwork(model, followed, values, tuple(points), flops)


def _shared(followed: NetworkGraph) -> dict[str, tuple[int, int]]:
    """By parameter that several nodes use: the places of the first and the last in the graph."""
    used: dict[int, tuple[str, int, int]] = {}

    for place, node in enumerate(followed.graph.nodes):
        target, found = str(node.target), []
        if node.op == "call_module":
            for name, parameter in followed.objects[target].named_parameters():
                found.append((parameter, f"{target}.{name}"))
        given = [str(one.target) for one in node.all_input_nodes if _is_parameter(one, followed)]
        for parameter, name in [*found, *((followed.objects[name], name) for name in given)]:
            name, first, _ = used.get(id(parameter), (name, place, place))
            used[id(parameter)] = name, first, place
    return {name: (first, last) for name, first, last in used.values() if first < last}


class _Profiler(fx.Interpreter):
    """Runs a graph, and notes of each node what it gives, its FLOPs, and which values before it it changes."""

    def __init__(self, module: fx.GraphModule, counter: FlopCounterMode) -> None:
        super().__init__(module)
        self.counter, self.flops = counter, {}
        self.results: dict[fx.Node, Any] = {}
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}
        self.changed: dict[fx.Node, set[fx.Node]] = {}

    def run_node(self, n: fx.Node):
        flops = self.counter.get_total_flops()
        versions = {node: value._version for node, value in self.env.items() if isinstance(value, Tensor)}
        result = super().run_node(n)
        self.flops[n] = self.counter.get_total_flops() - flops
        changed = {node for node, version in versions.items() if self.env[node]._version != version}
        if changed:
            self.changed[n] = changed
        if isinstance(result, Tensor):
            self.shapes[n] = tuple(result.shape)
        # What depends on no image: all that a block may have to make anew; activations would fill the memory.
        if (
            _is_size(result)
            or _is_device(n)
            or (n.op != "placeholder" and all(one in self.results for one in n.all_input_nodes))
        ):
            self.results[n] = result
        return result


@dataclass(frozen=True)
class Values:
    """What the nodes of a graph give, as trials with images show it."""

    shapes: dict[fx.Node, tuple[int, ...]]
    """Without the batch axis, of every node that yields a batched tensor."""
    flops: dict[fx.Node, int]
    """Per image."""
    changed: dict[fx.Node, set[fx.Node]]
    """By node the earlier values that it changes in place, in one mode at least."""
    sizes: dict[fx.Node, Any]
    """By node that gives whole numbers: each as `(fixed, per image)`."""
    free: set[fx.Node]
    """Nodes that depend on no image, only on how many there are."""


def _measured(model: nn.Module, followed: NetworkGraph, example_input: Tensor) -> Values:
    """Run the graph on two images in each mode, and where it gives sizes, on three."""
    images = example_input[:2] if len(example_input) > 1 else example_input[:1].expand(2, *example_input.shape[1:])
    more = torch.cat([images, images[:1]])
    counter = FlopCounterMode(display=False)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the fused attention kernel hides its matrix products
    try:
        with untouched(model), evaluation_mode(model), counter:
            runs = []
            for number, (mode, given) in enumerate(((False, images), (True, images), (False, more))):
                if number == 2 and not any(map(_is_size, runs[0].results.values())):
                    break
                torch.manual_seed(number)
                model.train(mode)
                profiler = _Profiler(fx.GraphModule(followed.objects, followed.graph), counter)
                profiler.run(given.clone())
                runs.append(profiler)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    evaluated, trained, larger = runs[0], runs[1], runs[-1]
    changed = {
        node: evaluated.changed.get(node, set()) | trained.changed.get(node, set()) for node in followed.graph.nodes
    }
    sizes = {
        node: _sizes(evaluated.results[node], larger.results[node])
        for node in evaluated.results
        if _is_size(evaluated.results[node]) and node in larger.results
    }
    sizes = {node: value for node, value in sizes.items() if value is not None}
    shapes = {node: shape[1:] for node, shape in evaluated.shapes.items() if shape and shape[0] == 2}
    values = Values(shapes, {node: flops // 2 for node, flops in evaluated.flops.items()}, changed, sizes, set())
    for node in followed.graph.nodes:
        if node in sizes or _is_device(node) or _is_free(node, followed, values, evaluated.results, trained.results):
            values.free.add(node)
    return values


def _is_free(node: fx.Node, followed: NetworkGraph, values: Values, first: dict, second: dict) -> bool:
    """Whether a node can be made anew in each block: it depends on no image, is the same whenever it runs, changes
    nothing, and trains nothing."""
    if node.op == "get_attr" or isinstance(followed.objects.get(str(node.target)), TrainingFlag):
        return True
    if node.op not in ("call_function", "call_method", "call_module") or values.changed[node]:
        return False
    if node.op == "call_module" and any(True for _ in followed.objects[str(node.target)].parameters()):
        return False
    inputs = node.all_input_nodes
    if not all(one in values.free for one in inputs) or any(_is_parameter(one, followed) for one in inputs):
        return False
    return node in first and node in second and _equal(first[node], second[node])


def _equal(one: Any, other: Any) -> bool:
    """Whether what a node gave twice is the same."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and bool(torch.equal(one, other))
    if isinstance(one, (tuple, list)):
        return isinstance(other, (tuple, list)) and len(one) == len(other) and all(map(_equal, one, other))
    return type(one) is type(other) and bool(one == other)  # pyright: ignore[reportReturnType]


def _is_device(node: fx.Node) -> bool:
    """Whether a node asks on which device a value is: all of a network are on one."""
    return node.op == "call_function" and node.target is getattr and str(node.args[1]) == "device"


def _is_parameter(node: fx.Node, followed: NetworkGraph) -> bool:
    return node.op == "get_attr" and isinstance(followed.objects[str(node.target)], nn.Parameter)


def _is_size(value: Any) -> bool:
    """Whether a value is a whole number, or a tuple of such."""
    if isinstance(value, tuple):
        return all(_is_size(part) for part in value)
    return isinstance(value, int) and not isinstance(value, bool)


def _sizes(of_two: Any, of_three: Any) -> Any:
    """Each number as `(fixed, per image)`; None if one is neither fixed nor a multiple of the number of images."""
    if isinstance(of_two, tuple):
        parts = tuple(_sizes(*pair) for pair in zip(of_two, of_three))
        return None if None in parts or len(of_two) != len(of_three) else parts
    if of_two == of_three:
        return of_two, 0
    return (0, of_two // 2) if of_two * 3 == of_three * 2 else None


def _mapped(make: Callable[[tuple[int, int]], Any], sizes: Any) -> Any:
    """`make` applied to each pair of `_sizes`."""
    return make(sizes) if sizes and isinstance(sizes[0], int) else tuple(_mapped(make, part) for part in sizes)


def _named_in(graph: fx.Graph) -> list[str]:
    """What the nodes of a graph name in their module."""
    return [str(node.target) for node in graph.nodes if node.op in ("get_attr", "call_module")]


def _single_carriers(graph: fx.Graph, values: Values) -> set[fx.Node]:
    """Nodes that are, at some moment of execution, the only value still needed, aside from those that depend on no
    image."""
    nodes = list(graph.nodes)
    position = {node: i for i, node in enumerate(nodes)}
    last_use = {node: max((position[user] for user in node.users), default=-1) for node in nodes}
    for node in nodes:
        if not node.users:  # one that changes others in place is over when they are
            last_use[node] = max((last_use[value] for value in values.changed.get(node, ())), default=-1)
    carriers, live = set(), set()
    for i, node in enumerate(nodes):
        if node not in values.free:
            live.add(node)
        live = {value for value in live if last_use[value] > i}
        if len(live) == 1:
            carrier = next(iter(live))
            if carrier.op not in ("placeholder", "output"):
                carriers.add(carrier)
    return carriers - {_last(graph)}


def _last(graph: fx.Graph) -> fx.Node:
    """The node that gives the logits."""
    return next(node for node in graph.nodes if node.op == "output").args[0]  # pyright: ignore[reportReturnType]


def _channel_axis(model: nn.Module, node: fx.Node, shapes: dict[fx.Node, tuple[int, ...]]) -> int:
    """1 for `[N, C, ...]`, -1 for channels last, as the nearest layer that declares a width has it.

    The search follows only nodes of the same shape, up and down, and none that reorders axes: beyond them the layout
    may be another.
    """
    shape = shapes[node]
    if len(shape) == 1:
        return 1
    if len(shape) == 2:
        before = next((shapes[one] for one in node.all_input_nodes if one in shapes), ())
        flat = len(before) == 3 and before[0] == shape[0] and math.prod(before[1:]) == shape[1]
        return 1 if flat else -1  # a map whose rows were joined, or tokens
    queue, seen = [node], {node}
    while queue:
        here = queue.pop(0)
        for neighbour in (here, *here.users):
            if neighbour.op == "call_module":
                side = "out" if neighbour is here else "in"
                axis = _declared_axis(called_module(model, neighbour), shape, side)
                if axis is not None:
                    return axis
        inputs = () if _reorders(model, here) else here.all_input_nodes
        for neighbour in (*(user for user in here.users if not _reorders(model, user)), *inputs):
            if neighbour not in seen and shapes.get(neighbour) == shape:
                seen.add(neighbour)
                queue.append(neighbour)
    return 1


_REORDERING = {"permute", "transpose", "movedim", "moveaxis", "swapaxes", "swapdims", "reshape", "view", "unflatten"}


def _reorders(model: nn.Module, node: fx.Node) -> bool:
    """Whether a node gives its axes another order or another meaning: a map as wide as it has channels then has the
    same shape behind it."""
    if node.op == "call_module":
        return type(called_module(model, node)).__name__.lower() in _REORDERING
    return getattr(node.target, "__name__", str(node.target)) in _REORDERING


def called_module(root: nn.Module, node: fx.Node) -> nn.Module:
    """The submodule of `root` that a `call_module` node of its graph calls."""
    assert isinstance(node.target, str)
    return root.get_submodule(node.target)


def _declared_axis(module: nn.Module, shape: tuple[int, ...], side: str) -> int | None:
    """The channel axis that a layer wants on its `side`, "in" or "out"; None if the layer does not say."""
    if isinstance(module, (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.GroupNorm)):
        return 1
    width = getattr(module, "normalized_shape", (getattr(module, f"{side}_features", None),))[-1]
    if width is None or width not in (shape[0], shape[-1]):
        return None
    return -1 if shape[-1] == width else 1
