"""Blocks whose batch norms, residual additions and ReLUs run as one operator while they train."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import TypeGuard

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from stablekd_fast import kernels
from stablekd_fast.blocks.trace import called_module
from stablekd_fast.errors import ConfigError

_RELU_FUNCTIONS = (F.relu, torch.relu, torch.relu_)
_ADD_FUNCTIONS = (operator.add, operator.iadd, torch.add)
FUSIONS = ("auto", "on", "off")


def pick_fusion(name: str, device: torch.device) -> bool:
    """Whether norms are fused; `auto` fuses them where there is a fast kernel: on a CPU for which the C++ core is
    built, on a GPU with Triton.

    Raises ConfigError if fused norms were asked for where there is no fast kernel.
    """
    if name not in FUSIONS:
        raise ConfigError(f"fuse_norms={name!r} was given; choose one of {', '.join(FUSIONS)}.")
    there = kernels.implementations()["batch_norm_act"].get(device.type, "reference") != "reference"
    if name == "on" and not there:
        raise ConfigError(
            f"fuse_norms=on was given, but on {device.type} there is no fast kernel for it "
            f"({kernels.implementations()['batch_norm_act']['reason']}); choose auto."
        )
    return there and name != "off"


class NormAct(nn.Module):
    """A batch norm of the network, together with the addition and the ReLU that follow it.

    In evaluation, and for inputs that `kernels.batch_norm_act` does not take at full speed, it computes as the network
    does.
    """

    def __init__(self, norm: nn.BatchNorm2d, relu: bool) -> None:
        super().__init__()
        self.norm, self.relu = norm, relu

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self._fits(x, residual):
            return self._fused(x, residual)
        out = self.norm(x)
        if residual is not None:
            out = out + residual
        return F.relu(out) if self.relu else out

    def _fits(self, x: Tensor, residual: Tensor | None) -> bool:
        alike = residual is None or (residual.shape == x.shape and residual.dtype == x.dtype)
        return self.norm.training and alike and x.is_contiguous(memory_format=torch.channels_last)

    def _fused(self, x: Tensor, residual: Tensor | None) -> Tensor:
        norm = self.norm
        assert norm.momentum is not None  # see `_joinable`
        return kernels.batch_norm_act(
            x, norm.weight, norm.bias, norm.running_mean, norm.running_var, residual,
            batches=norm.num_batches_tracked, momentum=norm.momentum, eps=norm.eps, relu=self.relu,
        )  # fmt: skip


def fuse_norms(block: nn.Module) -> nn.Module:
    """The same block with `NormAct` in place of batch norms and of what can be joined to them.

    The new block shares all parameters and buffers. A block that was not traced is returned as it is.
    """
    if not isinstance(block, fx.GraphModule):
        return block
    fused = fx.GraphModule(block, copy.deepcopy(block.graph))
    for node in list(fused.graph.nodes):
        if node.op == "call_module" and _joinable(norm := called_module(fused, node)):
            add, relu = followers(node)
            replace_joined(fused, node, add, relu, f"norm_act_{node.name}", NormAct(norm, relu is not None))
    fused.delete_all_unused_submodules()
    fused.graph.lint()
    fused.recompile()
    return fused


def is_plain(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether a module is of one of the kinds and can be replaced. Subclasses may compute something else, and hooks
    expect the module to be called."""
    return type(module) in kinds and not module._forward_hooks and not module._forward_pre_hooks


def _joinable(module: nn.Module) -> TypeGuard[nn.BatchNorm2d]:
    return is_plain(module, (nn.BatchNorm2d,)) and bool(module.affine) and module.momentum is not None


def followers(node: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    """The addition and the ReLU behind what a node gives, where both or the ReLU alone can be joined to it."""
    add = _only_user(node, _is_add)
    relu = _only_user(add or node, _is_relu)
    if add and (relu is None or _writes_to_another(add, node)):
        return None, None
    return add, relu


def replace_joined(
    graph: fx.GraphModule, node: fx.Node, add: fx.Node | None, relu: fx.Node | None, name: str, module: nn.Module
) -> None:
    """Replace a node and its `followers` by a call of `module`, which is given the node's operand and the residual."""
    last = relu or node
    others = [operand for operand in add.args if operand is not node] if add else []
    graph.add_submodule(name, module)
    with graph.graph.inserting_before(last):
        made = graph.graph.call_module(name, (node.args[0], *others))
    last.replace_all_uses_with(made)
    for one in (relu, add, node):
        if one is not None:
            graph.graph.erase_node(one)


def _writes_to_another(add: fx.Node, node: fx.Node) -> bool:
    """Whether an addition overwrites the residual, which may be used again."""
    return add.target in (operator.iadd, "add_") and add.args[0] is not node


def _only_user(node: fx.Node, kind: Callable[[fx.Node], bool]) -> fx.Node | None:
    """The one node that uses the result of `node`, if it is of a kind; else None."""
    users = list(node.users)
    return users[0] if len(users) == 1 and kind(users[0]) else None


def _is_relu(node: fx.Node) -> bool:
    root = node.graph.owning_module
    if node.op == "call_module" and root is not None:
        return type(called_module(root, node)) is nn.ReLU
    return node.target in {"call_function": _RELU_FUNCTIONS, "call_method": ("relu", "relu_")}.get(node.op, ())


def _is_add(node: fx.Node) -> bool:
    """Whether a node adds two different values, without a factor."""
    if node.target not in {"call_function": _ADD_FUNCTIONS, "call_method": ("add", "add_")}.get(node.op, ()):
        return False
    operands = [operand for operand in node.args if isinstance(operand, fx.Node)]
    return not node.kwargs and len(node.args) == len(set(operands)) == 2
