"""Registration with torch's dispatcher, and the record of which implementation serves each operator where."""

from __future__ import annotations

from collections.abc import Callable

import torch
from stablekd_fast.kernels import _native, _triton
from stablekd_fast.kernels._checks import accumulator, scaled
from torch import Tensor

_IMPLEMENTATIONS: dict[str, dict[str, str]] = {}


def define(name: str, schema: str, reference: Callable, fake: Callable) -> None:
    """Define `stablekd::<name>` with `reference` as its implementation on every device."""
    torch.library.define(f"stablekd::{name}", schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(f"stablekd::{name}", "default", reference)
    torch.library.register_fake(f"stablekd::{name}", fake)
    _IMPLEMENTATIONS[name] = {"cpu": "reference", "cuda": "reference", "reason": "it has no other implementation"}


def define_loss(
    name: str, arguments: str, loss: Callable, with_grad: Callable, differentiable: tuple[int, ...]
) -> Callable[..., Tensor]:
    """Define the operators `<name>` -> loss and `<name>_with_grad` -> (loss, gradient), and give the loss for autograd.

    The first argument is the student. `<name>_with_grad` takes two more arguments, `factor` (a number) and
    `upstream` (a 0-dim tensor or None), and multiplies loss and gradient by both.

    The function returned takes the arguments of `<name>` and can be differentiated with respect to those at the
    positions in `differentiable`. Where only the student asks, the gradient is made in the same pass as the loss and
    waits for backward; in every other case the reference, which is differentiable to any order, is differentiated.
    """
    define(name, f"({arguments}) -> Tensor", loss, _loss_fake)
    define(
        f"{name}_with_grad",
        f"({arguments}, float factor, Tensor? upstream) -> (Tensor, Tensor)",
        with_grad,
        _with_grad_fake,
    )
    count = arguments.count(",") + 1

    def setup_context(ctx, inputs, output) -> None:
        tensors = [value if isinstance(value, Tensor) else None for value in inputs]
        ctx.settings = [None if isinstance(value, Tensor) else value for value in inputs]
        gradient = None
        if isinstance(output, tuple):
            gradient = output[1]
            ctx.mark_non_differentiable(gradient)
        ctx.save_for_backward(*tensors, gradient)

    def backward(ctx, upstream: Tensor, *_):
        *tensors, gradient = ctx.saved_tensors
        gradients: list[Tensor | None] = [None] * len(tensors)
        wanted = [place for place in differentiable if ctx.needs_input_grad[place]]
        create_graph = torch.is_grad_enabled()
        if gradient is not None and wanted == [0] and not create_graph:
            gradients[0] = gradient * upstream
            return tuple(gradients)
        values = [setting if tensor is None else tensor for tensor, setting in zip(tensors, ctx.settings)]
        factor, scale = values[count:] or (1.0, None)
        with torch.enable_grad():
            value = scaled(factor * loss(*values[:count]), scale)
            found = torch.autograd.grad(value, [values[place] for place in wanted], upstream, create_graph=create_graph)
        for place, one in zip(wanted, found):
            gradients[place] = one
        return tuple(gradients)

    for operator in (name, f"{name}_with_grad"):
        torch.library.register_autograd(f"stablekd::{operator}", backward, setup_context=setup_context)
    alone, together = (getattr(torch.ops.stablekd, operator).default for operator in (name, f"{name}_with_grad"))

    def by_autograd(student: Tensor, *others) -> Tensor:
        if student.requires_grad and torch.is_grad_enabled():
            return together(student, *others, 1.0, None)[0]
        return alone(student, *others)

    return by_autograd


def serve_cpu(**implementations: Callable) -> None:
    """Let the C++ core serve the named operators on the CPU, if the core is there."""
    for name, implementation in implementations.items():
        if _native.core is None:
            _IMPLEMENTATIONS[name]["reason"] = _native.reason
            continue
        torch.library.impl(f"stablekd::{name}", "cpu", implementation)
        _IMPLEMENTATIONS[name]["cpu"] = f"C++ core, {_native.core.level()}"
        _IMPLEMENTATIONS[name]["reason"] = "the core is built and loads"


def serve_cuda(module: str, **references: Callable) -> None:
    """Let Triton kernels serve the named operators on NVIDIA GPUs; `references` maps names to what stands in for them.

    `module` is the operator's folder, whose `triton_impl.py` holds functions of the operators' names. It is imported
    when the first CUDA tensor comes, so that the package imports fast and without a GPU.
    """
    for name, reference in references.items():
        if _triton.missing is not None:
            continue
        torch.library.impl(f"stablekd::{name}", "cuda", _triton.implementation(module, name, reference))
        _IMPLEMENTATIONS[name]["cuda"] = "Triton"


def implementations() -> dict[str, dict[str, str]]:
    """For each operator the implementation on `cpu` and on `cuda`, and the `reason` for the choice."""
    table = {}
    for name, entry in sorted(_IMPLEMENTATIONS.items()):
        failure = _triton.failure(name)
        cuda = "reference" if failure else entry["cuda"]
        why = f"; on CUDA {failure or _triton.missing or 'it has no Triton kernel'}" if cuda == "reference" else ""
        table[name] = entry | {"cuda": cuda, "reason": entry["reason"] + why}
    return table


def _loss_fake(student, *_):
    return student.new_empty((), dtype=accumulator(student.dtype))


def _with_grad_fake(student, *_):
    return student.new_empty((), dtype=accumulator(student.dtype)), torch.empty_like(student)
