"""The teacher's blocks in the form in which they serve: weights in the type that they are computed in, and batch norms
folded into convolutions where that is asked for."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights

from stablekd_fast import kernels
from stablekd_fast.blocks.fuse import followers, is_plain, replace_joined
from stablekd_fast.blocks.pair import PairedBlocks
from stablekd_fast.blocks.trace import called_module, trace
from stablekd_fast.errors import ConfigError, StableKDError, first_line

FOLDINGS = ("auto", "on", "off")
EXAMPLES = 8
"""The images on which a folded teacher is compared with the plain one."""
_ALLOWED = 2.0
"""How many times the plain teacher's error against float64 that of the folded one may be."""


def pick_folding(name: str, device: torch.device) -> bool:
    """Whether the teacher is folded; `auto` folds it on a GPU, where each operation is a pass over memory and a launch.

    Raises ConfigError for other names than those of `FOLDINGS`.
    """
    if name not in FOLDINGS:
        raise ConfigError(f"fold_teacher={name!r} was given; choose one of {', '.join(FOLDINGS)}.")
    return device.type == "cuda" if name == "auto" else name == "on"


def serve(paired: PairedBlocks, images: Tensor, fold: str) -> PairedBlocks:
    """The pair with a teacher that serves as `fold` (one of `FOLDINGS`) says, tried on normalised `images`
    `[N, 3, H, W]`.

    Without folding its outputs have the bits of the plain blocks. A folded teacher rounds otherwise: on some of the
    images its error against float64 must be at most twice that of the plain one, at cuts and logits. Where it is
    not, or where the folded form fails, `auto` serves without folding, after a warning, and `on` raises ConfigError.
    """
    if not pick_folding(fold, images.device):
        return replace(paired, serving=_forms(paired, images, fold=False))
    folded = replace(paired, serving=_forms(paired, images, fold=True), folded=True)
    if not any(isinstance(module, ConvAct) for block in folded.serving_blocks for module in block.modules()):
        return replace(folded, folded=False)  # there was nothing to fold
    try:
        with torch.no_grad():
            folded.teacher_outputs(images)
        fault = _inexact(paired, folded, images[:EXAMPLES])
    except RuntimeError as error:
        fault = f"it cannot be computed: {first_line(error)}"
    if fault is None:
        return folded
    if fold == "on":
        raise ConfigError(f"fold_teacher=on was given, but {fault}; choose off.")
    warnings.warn(f"The teacher serves without folded norms: {fault}.", RuntimeWarning, stacklevel=2)
    return replace(paired, serving=_forms(paired, images, fold=False))


class ConvAct(nn.Module):
    """A convolution with a norm folded into it, together with the addition and the ReLU that follow it."""

    def __init__(self, conv: nn.Conv2d, relu: bool) -> None:
        super().__init__()
        self.conv, self.relu = conv, relu
        plain = conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
        # cuDNN's joined form of convolutions in groups takes four times as long as the plain one.
        self.joins = relu and plain and conv.groups == 1

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        conv, x = self.conv, x.to(self.conv.weight.dtype)
        if conv.bias is not None and x.is_cuda and self.joins and (residual is None or self._fits(residual, x)):
            sizes = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}
            return kernels.conv_act(x, conv.weight, conv.bias, residual, **sizes)
        out = conv(x)
        if residual is not None:
            out = out + residual
        return F.relu(out) if self.relu else out

    def _fits(self, residual: Tensor, x: Tensor) -> bool:
        """Whether the residual is like what the convolution gives for x, and is not broadcast."""
        conv = self.conv
        sizes = zip(x.shape[2:], conv.kernel_size, conv.stride, conv.padding, conv.dilation)
        places = [
            (size + 2 * int(padding) - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, padding, dilation in sizes
        ]
        return residual.dtype == x.dtype and residual.shape == (len(x), conv.out_channels, *places)


def _forms(paired: PairedBlocks, images: Tensor, fold: bool) -> list[nn.Module]:
    dtype = paired.precision.dtype
    if not fold and dtype == torch.float32:
        return paired.teacher_blocks
    blocks = paired.teacher_blocks
    if len(blocks) == 1:
        blocks = [_followed(blocks[0], images[:2])]
    return [_form(block, dtype, fold) for block in blocks]


def _followed(block: nn.Module, images: Tensor) -> nn.Module:
    """A network that was not cut as a graph, if it can be followed; else as it is."""
    if isinstance(block, (fx.GraphModule, nn.Sequential)):
        return block
    try:
        with torch.no_grad():
            return trace(block, images).split([])[0]
    except StableKDError:
        return block


def _form(block: nn.Module, dtype: torch.dtype, fold: bool) -> nn.Module:
    """A block that shares what it does not change; one that was not traced is returned as it is."""
    if type(block) is nn.Sequential:
        return nn.Sequential(*(_form(part, dtype, fold) for part in block))
    if not isinstance(block, fx.GraphModule):
        return block
    form = fx.GraphModule(block, copy.deepcopy(block.graph))
    form.training = block.training
    for node in list(form.graph.nodes):
        if node.op != "call_module" or not is_plain(called_module(form, node), (nn.Conv2d, nn.Linear)):
            continue
        module, norm = called_module(form, node), _norm_behind(form, node) if fold else None
        assert isinstance(module, (nn.Conv2d, nn.Linear))
        weight, bias = module.weight.detach(), None if module.bias is None else module.bias.detach()
        if norm is not None:
            weight, bias = _folded(weight, bias, called_module(form, norm))
            norm.replace_all_uses_with(node)
            form.graph.erase_node(norm)
        made = _with_weights(module, weight.to(dtype), None if bias is None else bias.to(dtype))
        add, relu = followers(node)
        if fold and isinstance(made, nn.Conv2d) and (norm or relu):
            replace_joined(form, node, add, relu, f"conv_act_{node.name}", ConvAct(made, relu is not None))
        else:
            name = f"serving_{node.name}"
            form.add_submodule(name, made)
            node.target = name
    form.delete_all_unused_submodules()
    form.graph.lint()
    form.recompile()
    return form


def _norm_behind(form: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The batch norm with running statistics that alone uses what a convolution gives."""
    users = list(node.users)
    if len(users) != 1 or users[0].op != "call_module" or not isinstance(called_module(form, node), nn.Conv2d):
        return None
    norm = called_module(form, users[0])
    known = is_plain(norm, (nn.BatchNorm2d,)) and norm.running_mean is not None and not norm.training
    return users[0] if known else None


def _folded(weight: Tensor, bias: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution and the norm behind it, in float64."""
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None
    moments = (norm.running_mean.double(), norm.running_var.double())
    scale, shift = (None if value is None else value.detach().double() for value in (norm.weight, norm.bias))
    found = fuse_conv_bn_weights(
        weight.double(), None if bias is None else bias.double(), *moments, norm.eps, scale, shift
    )
    return found[0].detach(), found[1].detach()


def _with_weights(module: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    made = copy.copy(module)
    made._parameters = {
        name: None if value is None else nn.Parameter(value, requires_grad=False)
        for name, value in (("weight", weight), ("bias", bias))
    }
    return made


def _inexact(plain: PairedBlocks, folded: PairedBlocks, images: Tensor) -> str | None:
    """Which output of the folded teacher is less exact than may be; None where all are exact enough."""
    ours, theirs = (pair.teacher_outputs(images) for pair in (folded, plain))
    for k, exact in enumerate(_exact_outputs(plain, images)):
        mine, eager = ((outputs[k].double() - exact).square().mean().sqrt() for outputs in (ours, theirs))
        least = torch.finfo(theirs[k].dtype).eps * exact.abs().mean()
        if not mine <= _ALLOWED * torch.maximum(eager, least):
            where = plain.cuts[k].name if k < len(plain.cuts) else "the logits"
            return f"folded, its error at {where} is {mine:.2g}, of the plain one {eager:.2g}"
    return None


@torch.no_grad()
def _exact_outputs(paired: PairedBlocks, images: Tensor) -> Iterator[Tensor]:
    x = images.double()
    for k, block in enumerate(paired.teacher_blocks):
        x = copy.deepcopy(block).double()(x)
        bridge = paired.bridge_after(k)
        yield x if bridge is None else copy.deepcopy(bridge).double()(x)
