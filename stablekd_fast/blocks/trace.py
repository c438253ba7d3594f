"""Find the places where one tensor carries a whole network, and split the network there.

The network is traced with `torch.fx`. A trace freezes every Python branch, `self.training` among them, so a
module whose `forward` reads it (dropout, stochastic depth, shifted-window attention) stays a leaf of the trace
and goes on honouring `.train()` and `.eval()`. Blocks refer to the network's own submodules and parameters.
"""

from __future__ import annotations

import inspect
import itertools
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

from stablekd_fast.blocks.modes import evaluation_mode
from stablekd_fast.errors import CutError

UNNAMED = 1_000
"""The depth of a cut point at which no module ends."""


@dataclass(frozen=True)
class CutPoint:
    """A value that alone carries the network: everything later depends on the input through it only."""

    name: str
    aliases: tuple[str, ...]
    node: fx.Node
    shape: tuple[int, ...]
    """The shape for one image, without the batch axis."""
    channel_axis: int
    """The axis of the channels in the batched tensor: 1 for `[N, C, H, W]`, -1 for `[N, H, W, C]` and tokens."""
    flops: int
    """FLOPs per image from the input up to here."""
    depth: int
    """How deep in the tree of modules the outermost one that ends here lies; `UNNAMED` where none ends."""

    @property
    def spatial(self) -> tuple[int, ...]:
        """The shape without its channels: `(H, W)`, `(tokens,)` or `()`."""
        axis = self.channel_axis - 1 if self.channel_axis > 0 else len(self.shape) - 1
        return self.shape[:axis] + self.shape[axis + 1 :]


@dataclass(frozen=True)
class TracedNetwork:
    """A network's graph with its cut points in the order of execution."""

    root: nn.Module
    graph: fx.Graph
    points: tuple[CutPoint, ...]
    flops: int
    """FLOPs of the whole network per image (multiply-add counted as two)."""

    def split(self, points: list[CutPoint]) -> list[fx.GraphModule]:
        """The network as `len(points) + 1` modules that compose to it and share its parameters."""
        nodes = list(self.graph.nodes)
        position = {node: i for i, node in enumerate(nodes)}
        entry = next(node for node in nodes if node.op == "placeholder")
        exit_node = next(node for node in nodes if node.op == "output").args[0]
        borders = [entry, *(point.node for point in points), exit_node]
        return [
            _segment(self.root, nodes[position[first] + 1 : position[last] + 1], first, last)
            for first, last in itertools.pairwise(borders)
        ]


def trace(model: nn.Module, example_input: torch.Tensor) -> TracedNetwork:
    """Trace `model` on `example_input` `[N, ...]` and list its cut points.

    Raises CutError where `torch.fx` cannot follow the network.
    """
    graph, module_outputs = _trace_graph(model, tuple(example_input.shape[1:]))
    shapes, costs = _profile(model, graph, example_input)
    aliases: dict[fx.Node, list[str]] = {}
    for path, node in module_outputs.items():
        aliases.setdefault(node, []).append(path)

    carriers = _single_carriers(graph)
    points, flops = [], 0
    for node in graph.nodes:
        flops += costs.get(node, 0)
        if node in carriers and node in shapes:
            modules = sorted(aliases.get(node, []), key=lambda path: (path.count("."), path))
            names = tuple(modules) or (node.name,)
            depth = names[0].count(".") if modules else UNNAMED
            axis = _channel_axis(model, node, shapes)
            points.append(CutPoint(names[0], names, node, shapes[node], axis, flops, depth))
    return TracedNetwork(model, graph, tuple(points), flops)


class _BlockTracer(fx.Tracer):
    """Traces into containers, and keeps as leaves the modules that a trace would freeze or cannot follow."""

    def __init__(self, image_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.image_shape = image_shape
        self.module_outputs: dict[str, fx.Node] = {}

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Images(node, self) if node.op == "placeholder" else super().proxy(node)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        childless = next(m.children(), None) is None
        return childless or _reads_training_flag(m) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m, forward, args, kwargs):
        path = self.path_of_module(m)
        nodes_before, stack_before = set(self.graph.nodes), dict(self.module_stack)
        try:
            result = super().call_module(m, forward, args, kwargs)
        except Exception:
            # The module runs Python that cannot be traced: take back its half-made nodes, and make it a leaf.
            for node in reversed(list(self.graph.nodes)):
                if node not in nodes_before:
                    self.graph.erase_node(node)
            self.module_stack.clear()
            self.module_stack.update(stack_before)
            result = self.create_proxy("call_module", path, args, kwargs)
        # A module that returns several values, such as features to look at, gives what the network goes on with first.
        carried = result[0] if isinstance(result, tuple) and result else result
        if isinstance(carried, fx.Proxy):
            self.module_outputs[path] = carried.node
        return result


class _Images(fx.Proxy):
    """The network's input: Python can branch on the size of an image, while the number of images stays open."""

    @property
    def shape(self) -> tuple:
        assert isinstance(self.tracer, _BlockTracer)
        return (self.size(0), *self.tracer.image_shape)


def _reads_training_flag(module: nn.Module) -> bool:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "training" in code.co_names


def _trace_graph(model: nn.Module, image_shape: tuple[int, ...]) -> tuple[fx.Graph, dict[str, fx.Node]]:
    """The network's graph from one input to its logits, and the node of each module's output by the module's path."""
    tracer = _BlockTracer(image_shape)
    try:
        with evaluation_mode(model):
            graph = tracer.trace(model)
            if _reads_training_flag(model):
                model.train()
                if str(_BlockTracer(image_shape).trace(model)) != str(graph):
                    raise CutError(
                        f"{type(model).__name__}.forward does different things in train and eval mode, which a trace "
                        "cannot keep. Pass teacher_blocks= and student_blocks= (lists of modules) instead of cuts."
                    )
    except CutError:
        raise
    except Exception as error:
        raise CutError(
            f"torch.fx cannot trace {type(model).__name__} ({type(error).__name__}: {error}). "
            "Pass teacher_blocks= and student_blocks= (lists of modules that compose to the model) instead of cuts."
        ) from error
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    output = next(node for node in graph.nodes if node.op == "output").args[0]
    if not isinstance(output, fx.Node):
        raise CutError(f"{type(model).__name__} returns {type(output).__name__}, but one tensor of logits is needed.")
    for extra in inputs[1:]:
        if extra.users:
            raise CutError(f"{type(model).__name__}.forward takes several inputs, but one image tensor is needed.")
        graph.erase_node(extra)
    _drop_unused(graph)
    return graph, tracer.module_outputs


def _drop_unused(graph: fx.Graph) -> None:
    """Remove nodes on which the logits do not depend, such as features that are returned beside them."""
    for node in reversed(graph.nodes):
        if node.op not in ("placeholder", "output") and not node.users:
            graph.erase_node(node)


class _Profiler(fx.Interpreter):
    """Runs a graph and notes each node's shape and FLOPs."""

    def __init__(self, module: fx.GraphModule, counter: FlopCounterMode) -> None:
        super().__init__(module)
        self.counter, self.shapes, self.flops = counter, {}, {}

    def run_node(self, n: fx.Node):
        before = self.counter.get_total_flops()
        result = super().run_node(n)
        self.flops[n] = self.counter.get_total_flops() - before
        if isinstance(result, torch.Tensor):
            self.shapes[n] = tuple(result.shape)
        return result


def _profile(model: nn.Module, graph: fx.Graph, example_input: torch.Tensor):
    """Shapes without the batch axis, and FLOPs per image, of every node that yields a batched tensor."""
    images = example_input[:2]
    counter = FlopCounterMode(display=False)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the fused attention kernel hides its matrix products
    try:
        with evaluation_mode(model), torch.no_grad(), counter:
            profiler = _Profiler(fx.GraphModule(model, graph), counter)
            profiler.run(images)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    n = len(images)
    shapes = {node: shape[1:] for node, shape in profiler.shapes.items() if shape and shape[0] == n}
    return shapes, {node: flops // n for node, flops in profiler.flops.items()}


def _single_carriers(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that are, at some moment of execution, the only value still needed (parameters aside)."""
    nodes = list(graph.nodes)
    last_use = {node: max((nodes.index(user) for user in node.users), default=-1) for node in nodes}
    carriers, live = set(), set()
    for i, node in enumerate(nodes):
        if node.op != "get_attr":
            live.add(node)
        live = {value for value in live if last_use[value] > i}
        if len(live) == 1:
            carrier = next(iter(live))
            if carrier.op not in ("placeholder", "output"):
                carriers.add(carrier)
    final = next(node for node in nodes if node.op == "output").args[0]
    return carriers - {final}


def _channel_axis(model: nn.Module, node: fx.Node, shapes: dict[fx.Node, tuple[int, ...]]) -> int:
    """1 for `[N, C, ...]`, -1 for channels last, as the nearest layer that declares a width has it.

    The search follows only nodes of the same shape, up and down, and none that reorders axes: beyond them the layout
    may be another.
    """
    shape = shapes[node]
    if len(shape) == 1:
        return 1
    if len(shape) == 2:
        return -1  # tokens
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


def _segment(root: nn.Module, nodes: list[fx.Node], entry: fx.Node, exit_node: fx.Node) -> fx.GraphModule:
    """A module of the given nodes, which map the value of `entry` to that of `exit_node`."""
    graph = fx.Graph()
    copies = {entry: graph.placeholder("x")}

    def copied(node: fx.Node) -> fx.Node:
        if node not in copies and node.op == "get_attr":
            copies[node] = graph.node_copy(node)
        return copies[node]

    for node in nodes:
        if node.op not in ("placeholder", "output") and node not in copies:
            copies[node] = graph.node_copy(node, copied)
    graph.output(copies[exit_node])
    return fx.GraphModule(root, graph)
