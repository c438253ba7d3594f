"""Networks on fake CUDA tensors, which have a device, a type and a shape but no data, and what torch lacks to train
them without a driver."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from stablekd_fast.blocks import PairedBlocks


def on_fake_cuda(
    paired: PairedBlocks, mode: FakeTensorMode, device: str = "cuda", beside: Sequence[torch.nn.Module] = ()
) -> None:
    """Replace every parameter and buffer of the blocks, and of modules `beside` them, by a fake one on `cuda`."""
    holder = torch.nn.ModuleList([paired.teacher, paired.student, *paired.teacher_blocks, *paired.student_blocks])
    holder.extend(beside)
    holder.extend(part for part in (*paired.bridges, *(paired.serving or ())) if part is not None)
    replaced: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in replaced:
            with mode:
                made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
            parameter = isinstance(tensor, torch.nn.Parameter)
            replaced[id(tensor)] = torch.nn.Parameter(made) if parameter else made
        return replaced[id(tensor)]

    for module in holder.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None:
                    store[name] = fake(tensor)


def as_cudnn_lays_out(x: Tensor, weight: Tensor, _: object) -> torch.memory_format:
    """Which memory format a convolution's result has: without a driver torch takes cuDNN for absent."""
    last = torch.channels_last
    laid = any(one.dim() == 4 and one.is_contiguous(memory_format=last) for one in (x, weight))
    return last if laid and x.dim() == 4 else torch.contiguous_format


def walk_backward(outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """`torch.autograd.backward` without its engine, which asks the driver for streams: calls each node of the graph
    once its gradients are complete."""
    waiting: dict[Any, int] = {}
    given: dict[Any, dict[int, Tensor]] = {}
    counted: set[Any] = set()

    def count(node: Any) -> None:
        if node in counted:
            return
        counted.add(node)
        for following, _ in node.next_functions:
            if following is not None:
                waiting[following] = waiting.get(following, 0) + 1
                count(following)

    def give(node: Any, place: int, gradient: Tensor | None) -> None:
        slots = given.setdefault(node, {})
        if gradient is not None:
            expected = node._input_metadata[place]
            gradient = gradient.sum_to_size(expected.shape).to(expected.dtype)
            slots[place] = gradient if place not in slots else slots[place] + gradient

    for output, gradient in zip(outputs, gradients, strict=True):
        count(output.grad_fn)
        give(output.grad_fn, output.output_nr, gradient)
    ready = [output.grad_fn for output in outputs if output.grad_fn not in waiting]
    with torch.no_grad():
        while ready:
            node = ready.pop()
            slots = given.pop(node)
            if hasattr(node, "variable"):
                node.variable.grad = slots[0]
                continue
            call = node if callable(node) else node.apply  # as those of Python functions
            found = call(*[slots.get(place) for place in range(len(node._input_metadata))])
            found = found if isinstance(found, tuple) else (found,)
            for (following, place), gradient in zip(node.next_functions, found):
                if following is not None:
                    give(following, place, gradient)
                    waiting[following] -= 1
                    if waiting[following] == 0:
                        ready.append(following)
