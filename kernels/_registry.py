"""Registration with torch's dispatcher, and the record of which implementation serves each operator where."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stablekd_fast.kernels import _native, _triton
from stablekd_fast.kernels._checks import accumulator

_IMPLEMENTATIONS: dict[str, dict[str, str]] = {}


def define(name: str, schema: str, reference: Callable, fake: Callable) -> None:
    """Define `stablekd::<name>` with `reference` as its implementation on every device."""
    torch.library.define(f"stablekd::{name}", schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(f"stablekd::{name}", "default", reference)
    torch.library.register_fake(f"stablekd::{name}", fake)
    _IMPLEMENTATIONS[name] = {"cpu": "reference", "cuda": "reference", "reason": "it has no other implementation"}


def define_loss(
    name: str, arguments: str, loss: Callable, with_grad: Callable, differentiable: tuple[int, ...]
) -> None:
    """Define the operator pair `<name>` -> loss and `<name>_with_grad` -> (loss, gradient) of a loss.

    The first argument is the student. `<name>_with_grad` takes two more arguments, `factor` (a number) and
    `upstream` (a 0-dim tensor or None), and multiplies loss and gradient by both. `<name>` can be differentiated
    with respect to the arguments at the positions in `differentiable`: once with respect to the student by the
    fused operator, in every other case through the reference, which is differentiable to any order.
    """
    define(name, f"({arguments}) -> Tensor", loss, _loss_fake)
    define(
        f"{name}_with_grad",
        f"({arguments}, float factor, Tensor? upstream) -> (Tensor, Tensor)",
        with_grad,
        _with_grad_fake,
    )
    fused = getattr(torch.ops.stablekd, f"{name}_with_grad")

    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*(value if isinstance(value, Tensor) else None for value in inputs))
        ctx.settings = [None if isinstance(value, Tensor) else value for value in inputs]

    def backward(ctx, upstream: Tensor):
        saved = ctx.saved_tensors
        values = [setting if tensor is None else tensor for tensor, setting in zip(saved, ctx.settings)]
        gradients: list[Tensor | None] = [None] * len(values)
        wanted = [place for place in differentiable if ctx.needs_input_grad[place]]
        if wanted == [0] and not torch.is_grad_enabled():
            gradients[0] = fused(*values, 1.0, upstream)[1]
        else:
            create_graph = torch.is_grad_enabled()
            with torch.enable_grad():
                operands = [values[place] for place in wanted]
                found = torch.autograd.grad(loss(*values), operands, upstream, create_graph=create_graph)
            for place, gradient in zip(wanted, found):
                gradients[place] = gradient
        return tuple(gradients)

    torch.library.register_autograd(f"stablekd::{name}", backward, setup_context=setup_context)


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
            _IMPLEMENTATIONS[name]["reason"] += f"; on CUDA {_triton.missing}"
            continue
        torch.library.impl(f"stablekd::{name}", "cuda", _triton.implementation(module, name, reference))
        _IMPLEMENTATIONS[name]["cuda"] = "Triton"


def implementations() -> dict[str, dict[str, str]]:
    """For each operator the implementation on `cpu` and on `cuda`, and the `reason` for the choice."""
    return {name: dict(entry) | _triton.fallen_back(name) for name, entry in sorted(_IMPLEMENTATIONS.items())}


def _loss_fake(student, *_):
    return student.new_empty((), dtype=accumulator(student.dtype))


def _with_grad_fake(student, *_):
    return student.new_empty((), dtype=accumulator(student.dtype)), torch.empty_like(student)
