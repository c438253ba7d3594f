"""Weights in the type that forward passes compute in: cast together, once a step, and not at each use."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from stablekd_fast.blocks.fuse import is_plain
from stablekd_fast.blocks.trace import called_module

_KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
"""Modules whose weights autocast casts at each call, and which use them in no other way."""


class CastWeights:
    """The weights of blocks that autocast would cast, in `dtype`; gradients come back to the parameters in theirs.

    Numbers are those of autocast. Weights of blocks that were not traced, and weights that are used in other ways too,
    are left to it.
    """

    def __init__(self, blocks: Sequence[nn.Module], dtype: torch.dtype) -> None:
        found = [_castable(block) for block in blocks]
        parameters = {id(parameter): parameter for names in found for parameter in names.values()}
        casts = {
            key: torch.empty_like(parameter, dtype=dtype, requires_grad=True) for key, parameter in parameters.items()
        }
        self.parameters: list[Tensor] = list(parameters.values())
        self.casts = list(casts.values())
        self.blocks = list(blocks)
        self._of_block = [{name: casts[id(parameter)] for name, parameter in names.items()} for names in found]

    @torch.no_grad()
    def refresh(self) -> None:
        """Cast the parameters as they are now."""
        if self.casts:
            torch._foreach_copy_(self.casts, self.parameters)

    def call(self, number: int, x: Tensor) -> Tensor:
        """Compute a block by its number with the weights that `refresh` cast."""
        if not self._of_block[number]:
            return self.blocks[number](x)
        return functional_call(self.blocks[number], self._of_block[number], (x,))

    @torch.no_grad()
    def hand_back(self) -> None:
        """Add what backward left at the casts to the parameters' gradients."""
        pairs = [(parameter, cast) for parameter, cast in zip(self.parameters, self.casts) if cast.grad is not None]
        if not pairs:
            return
        gradients = [torch.empty_like(parameter) for parameter, _ in pairs]
        torch._foreach_copy_(gradients, [cast.grad for _, cast in pairs if cast.grad is not None])
        for (parameter, cast), gradient in zip(pairs, gradients):
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
            cast.grad = None


def _castable(block: nn.Module) -> dict[str, nn.Parameter]:
    """By its name in a traced block each trainable weight that calls of `_KINDS` alone use."""
    if not isinstance(block, fx.GraphModule):
        return {}
    callers = {str(node.target): called_module(block, node) for node in block.graph.nodes if node.op == "call_module"}
    names = {name: parameter for name, parameter in block.named_parameters(remove_duplicate=False)}
    users: dict[int, set[bool]] = {}
    for name, parameter in names.items():
        owner = callers.get(name.rpartition(".")[0])
        users.setdefault(id(parameter), set()).add(owner is not None and is_plain(owner, _KINDS))
    read = {id(names[str(node.target)]) for node in block.graph.nodes if node.op == "get_attr" and node.target in names}
    return {
        name: parameter
        for name, parameter in names.items()
        if users[id(parameter)] == {True} and id(parameter) not in read and parameter.requires_grad
    }
