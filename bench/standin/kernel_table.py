"""What one dispatched operation is on a real GPU: of which kind, how many kernels, and how many bytes they move.

torch dispatches an operation once, and its CUDA code launches several kernels for it, or one for many tensors. The
numbers were read from torch's sources (`aten/src/ATen/native/cuda`) for channels-last maps, and compared with what an
H200 launched (docs/results/budget.md). What cuDNN launches it chooses itself: only an average can be stated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

KINDS = ("convolutions", "products", "norms", "elementwise", "reductions", "copies", "optimizer", "ours")
"""Kinds of kernels. `copies` are casts, fills, gathers and what else only moves values; `ours` are Triton's."""


@dataclass(frozen=True)
class Work:
    """The kernels of one operation, the bytes that they read and write on the device, and their floating-point
    operations."""

    kind: str
    kernels: int
    moved: int
    flops: int = 0


WEIGHT_GRADIENT = 3
"""Kernels of a convolution's weight gradient in bf16. cuDNN divides the long sum, so that buffers are cleared and added
up: 2.5 on average over the 19 convolutions of a resnet20 on an H100, with algorithms chosen by trial; 3.9 without."""

_BATCH_NORM_TRAINING = 4  # clears its semaphores, collects, updates the statistics, transforms
_BATCH_NORM_EVALUATION = 3  # copies the mean, inverts the deviation, transforms
_BATCH_NORM_BACKWARD = 3  # clears its semaphores, reduces, computes the gradient
_CHUNK, _CHUNKS = 65536, 320
_TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
"""How many tensors a kernel of `_foreach_*` takes, by the number of lists that it reads and writes."""

_NORMS = {
    f"{name}{suffix}"
    for name in ("native_batch_norm", "cudnn_batch_norm", "native_layer_norm", "native_group_norm")
    for suffix in ("", "_backward")
}
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
_ATTENTION = "_scaled_dot_product"
_COPIES = set(
    "_to_copy copy_ clone cat stack fill_ zero_ zeros zeros_like ones ones_like full full_like new_zeros arange "
    "index_select gather index constant_pad_nd flip scalar_tensor slice_backward select_backward _foreach_copy_".split()
)
_REDUCTIONS = set(
    "sum mean amax amin max min var std any all argmax norm linalg_vector_norm _softmax _log_softmax avg_pool2d "
    "max_pool2d_with_indices max_pool2d_with_indices_backward _adaptive_avg_pool2d".split()
)
_GATHERING = {"index_select", "gather", "index", "embedding"}
"""Operations that read of their first operand as much as they give."""
_SEVERAL = {"constant_pad_nd": 2, "slice_backward": 2, "select_backward": 2, "max_pool2d_with_indices_backward": 2}
"""A fill, and what is then put into it."""


def work_of(function: torch._ops.OpOverload, args: tuple, kwargs: dict, result: Any) -> Work:
    """Return what an operation of torch's own that was given these arguments is on a device."""
    name, packet = function.overloadpacket.__name__, function.overloadpacket
    flops = flop_registry[packet](*args, **kwargs, out_val=result) if packet in flop_registry else 0
    moved = _moved(function, args, kwargs, result) + _read_again(name, args)
    return Work(_kind(name, function), _kernels(name, args, result), moved, flops)


def joined_convolution(args: tuple, result: Tensor) -> Work:
    """Return what `kernels.conv_act` is, which is given all that the convolution reads: one kernel of cuDNN."""
    x, weight, bias, _, *sizes = args
    convolution = torch.ops.aten.convolution
    flops = flop_registry[convolution](x, weight, bias, *sizes, False, [0, 0], 1, out_val=result)
    return Work("convolutions", 1, _bytes(args) + _bytes(result), flops)


def _kind(name: str, function: torch._ops.OpOverload) -> str:
    if name.startswith("convolution"):
        return "convolutions"
    if name.startswith(("_foreach", "_fused", "_amp")) and name not in _COPIES:
        return "optimizer"
    if name.startswith(_ATTENTION):
        return "products"
    sets = {"products": _PRODUCTS, "norms": _NORMS, "copies": _COPIES, "reductions": _REDUCTIONS}
    return next((kind for kind, names in sets.items() if name in names), "elementwise")


def _kernels(name: str, args: tuple, result: Any) -> int:
    if name == "native_batch_norm":
        training = args[5]
        return _BATCH_NORM_TRAINING if training else _BATCH_NORM_EVALUATION
    if name == "native_batch_norm_backward":
        return _BATCH_NORM_BACKWARD
    if name == "convolution_backward":
        to_input, to_weight, to_bias = args[-1]
        return to_input + WEIGHT_GRADIENT * to_weight + to_bias
    if name.startswith(("_foreach", "_fused")):
        return _of_lists([given for given in (*args, result) if _is_list(given)], mutates=result is None)
    return _SEVERAL.get(name, 1)


def _of_lists(lists: list[list[Tensor]], *, mutates: bool) -> int:
    """Return the kernels over lists of tensors: one takes so many tensors, and so many chunks of their elements."""
    tensors = max(map(len, lists), default=0)
    if not tensors:
        return 0
    chunks = sum(math.ceil(tensor.numel() / _CHUNK) for tensor in lists[0])
    return max(math.ceil(tensors / _TENSORS[min(len(lists), 5)]), math.ceil(chunks / _CHUNKS))


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(one, Tensor) for one in value)


def _moved(function: torch._ops.OpOverload, args: tuple, kwargs: dict, result: Any) -> int:
    """Return the bytes of all operands on the device that are read, and of all that are written, each once."""
    name, read, written = function.overloadpacket.__name__, 0, 0
    arguments = function._schema.arguments
    given = [*args, *(kwargs[one.name] for one in arguments[len(args) :] if one.name in kwargs)]
    named = [one for one in arguments if one in arguments[: len(args)] or one.name in kwargs]
    for argument, value in zip(named, given):
        size = _bytes(value)
        changes = argument.alias_info is not None and argument.alias_info.is_write
        written += size * changes
        overwrites = changes and (argument.is_out or (argument is arguments[0] and name in ("copy_", "fill_", "zero_")))
        read += 0 if overwrites else size
    fresh = 0 if any(one.alias_info is not None for one in function._schema.returns) else _bytes(result)
    if name in _GATHERING:
        read += fresh - _bytes(args[0])
    return read + written + fresh


def _read_again(name: str, args: tuple) -> int:
    """Return the bytes of operands that are read twice: a norm takes its statistics before it computes."""
    if name == "native_batch_norm":
        return _bytes(args[0]) if args[5] else 0
    return _bytes(args[:2]) if name == "native_batch_norm_backward" else 0


def _bytes(value: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.is_cuda)
