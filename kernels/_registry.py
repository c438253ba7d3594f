"""Registration with torch's dispatcher, and the record of which implementation serves each operator where.

The dispatcher hands operands over one by one. A loss lists its own once, as the fields of a named tuple `Operands` in
its `reference.py`: the schema follows from it, and every implementation takes it as one argument.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from stablekd_fast.kernels import _native, _triton
from stablekd_fast.kernels._checks import Given, accumulator, check_upstream, scaled

Loss = Callable[[Given], Tensor]
LossWithGrad = Callable[[Given, float, Tensor | None], tuple[Tensor, Tensor]]
"""`(operands, factor, upstream)` -> (loss, gradient with respect to the student), both times `factor` (a number) and
`upstream` (a 0-dim tensor or None)."""

_SCHEMA_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", int: "int", str: "str", str | None: "str?"}

_IMPLEMENTATIONS: dict[str, dict[str, str]] = {}

_GIVEN_UP: dict[str, Callable[[], str | None]] = {}
"""For operators that a library serves on CUDA, what says why it no longer does."""

_OPERANDS: dict[str, type[NamedTuple]] = {}
"""For each operator whose implementations take their operands as one argument, the class of that argument."""

_ON_CPU = torch._C._dispatch_keys(torch.empty(0, device="cpu")).raw_repr()
"""What a tensor is to the dispatcher that has memory of the CPU and is nothing else besides."""


def define(name: str, schema: str, reference: Callable, fake: Callable) -> None:
    """Define `stablekd::<name>` with `reference` as its implementation on every device."""
    torch.library.define(f"stablekd::{name}", schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(f"stablekd::{name}", "default", _taking_one_by_one(name, reference))
    torch.library.register_fake(f"stablekd::{name}", fake)
    _IMPLEMENTATIONS[name] = {"cpu": "reference", "cuda": "reference", "reason": "it has no other implementation"}


def define_loss(
    name: str, operands: type[Given], loss: Loss[Given], with_grad: LossWithGrad[Given], differentiable: tuple[str, ...]
) -> tuple[Loss[Given], LossWithGrad[Given]]:
    """Define the operators `<name>` and `<name>_with_grad` by their references, and return how to call them.

    The first function returned gives the loss, and can be differentiated with respect to the `differentiable` operands.
    Where only the student asks, the gradient is made in the same pass as the loss and waits for backward. On a CPU that
    hands it out as it is where what comes upstream is 1, and makes it anew if it is asked for again. The gradient of a
    float16 student, which would be rounded to nothing before it is scaled, is made in backward, from what comes
    upstream. In every other case the reference, which is differentiable to any order, is differentiated. The second
    function returned gives loss and gradient, and records nothing for autograd.
    """
    arguments = ", ".join(f"{_SCHEMA_TYPES[kind]} {field}" for field, kind in get_type_hints(operands).items())
    with_factors = f"{arguments}, float factor, Tensor? upstream"
    _OPERANDS[name] = _OPERANDS[f"{name}_with_grad"] = operands
    define(name, f"({arguments}) -> Tensor", loss, _loss_fake)
    define(f"{name}_with_grad", f"({with_factors}) -> (Tensor, Tensor)", with_grad, _with_grad_fake)
    places = [operands._fields.index(field) for field in differentiable]
    backward = _backward_of(f"{name}_with_grad", operands, loss, places)
    for operator in (name, f"{name}_with_grad"):
        torch.library.register_autograd(f"stablekd::{operator}", backward, setup_context=_setup_context)
    alone, together = (getattr(torch.ops.stablekd, operator).default for operator in (name, f"{name}_with_grad"))

    def by_autograd(given: Given) -> Tensor:
        if given[0].requires_grad and torch.is_grad_enabled() and given[0].dtype != torch.float16:
            return together(*given, 1.0, None)[0]
        return alone(*given)

    def without_autograd(given: Given, factor: float, upstream: Tensor | None) -> tuple[Tensor, Tensor]:
        check_upstream(upstream, given[0])
        with torch.no_grad():
            return together(*given, factor, upstream)

    return by_autograd, without_autograd


def _setup_context(ctx: Any, inputs: tuple, output: Tensor | tuple[Tensor, Tensor]) -> None:
    tensors = [value if isinstance(value, Tensor) else None for value in inputs]
    ctx.settings = [None if isinstance(value, Tensor) else value for value in inputs]
    ctx.own = saved = None
    if isinstance(output, tuple):
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)  # no zeros for the second output
        if _host_may_read(output[1]):
            ctx.own = output[1]
        else:
            saved = output[1]
    ctx.save_for_backward(*tensors, saved)


def _host_may_read(tensor: Tensor) -> bool:
    """Say whether the host may look at the numbers of `tensor`: they lie on the CPU, and nothing traces it."""
    return torch._C._dispatch_keys(tensor).raw_repr() == _ON_CPU and torch._C._len_torch_dispatch_stack() == 0


def _backward_of(with_grad: str, operands: type[Given], loss: Loss[Given], differentiable: list[int]) -> Callable:
    """Return the backward of a loss and of its operator `with_grad`, with respect to the operands at the places in
    `differentiable`."""
    count = len(operands._fields)

    def backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, saved = ctx.saved_tensors
        gradients: list[Tensor | None] = [None] * len(tensors)
        if upstream is None:  # nobody asked about the loss
            return tuple(gradients)
        own, ctx.own = ctx.own, None
        wanted = [place for place in differentiable if ctx.needs_input_grad[place]]
        create_graph = torch.is_grad_enabled()
        values = [setting if tensor is None else tensor for tensor, setting in zip(tensors, ctx.settings)]
        if wanted == [0] and not create_graph:
            fused = getattr(torch.ops.stablekd, with_grad)
            gradients[0] = _student_gradient(fused, values, count, own, saved, upstream)
            return tuple(gradients)
        factor, scale = values[count:] or (1.0, None)
        with torch.enable_grad():
            value = scaled(factor * loss(operands._make(values[:count])), scale)
            found = torch.autograd.grad(value, [values[place] for place in wanted], upstream, create_graph=create_graph)
        for place, one in zip(wanted, found):
            gradients[place] = one
        return tuple(gradients)

    return backward


def _student_gradient(
    with_grad: Callable, values: list, count: int, own: Tensor | None, saved: Tensor | None, upstream: Tensor
) -> Tensor:
    """Return the gradient of a loss with respect to the student, times `upstream`.

    `values` are the arguments of the operator that gave the loss: `count` operands, and factor and upstream where it
    made the gradient too. That waits as `saved`, which backward must not hand out, as later ones read it again; or as
    `own`, which the graph has let go of and no later backward sees: whoever receives it may write into it. A later
    backward makes it anew, of the same bits.
    """
    if len(values) == count:
        return with_grad(*values, 1.0, upstream)[1]
    if saved is not None:
        return saved * upstream
    gradient = with_grad(*values)[1] if own is None else own
    return gradient if _host_may_read(upstream) and upstream.item() == 1 else gradient * upstream


def _taking_one_by_one(name: str, implementation: Callable) -> Callable:
    """Return `implementation` of the operator `name` as the dispatcher calls it."""
    operands = _OPERANDS.get(name)
    if operands is None:
        return implementation
    make, count = operands._make, len(operands._fields)

    def call(*arguments: Any) -> Any:
        return implementation(make(arguments[:count]), *arguments[count:])

    return call


def serve_cpu(**implementations: Callable) -> None:
    """Let the C++ core serve the named operators on the CPU, if the core is there."""
    for name, implementation in implementations.items():
        if _native.reason is not None:
            _IMPLEMENTATIONS[name]["reason"] = _native.reason
            continue
        torch.library.impl(f"stablekd::{name}", "cpu", _taking_one_by_one(name, implementation))
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
        implementation = _triton.implementation(module, name, reference)
        torch.library.impl(f"stablekd::{name}", "cuda", _taking_one_by_one(name, implementation))
        _IMPLEMENTATIONS[name]["cuda"] = "Triton"


def serve_library(name: str, library: str, implementation: Callable, given_up: Callable[[], str | None]) -> None:
    """Let a library that torch brings serve an operator on NVIDIA GPUs. `given_up` returns why the reference serves
    there instead, and None while the library does."""
    torch.library.impl(f"stablekd::{name}", "cuda", implementation)
    _IMPLEMENTATIONS[name]["cuda"], _GIVEN_UP[name] = library, given_up


def implementations() -> dict[str, dict[str, str]]:
    """Return for each operator the implementation on `cpu` and on `cuda`, and the `reason` for the choice."""
    table = {}
    for name, entry in sorted(_IMPLEMENTATIONS.items()):
        failure = _GIVEN_UP[name]() if name in _GIVEN_UP else _triton.failure(name)
        cuda = "reference" if failure else entry["cuda"]
        why = f"; on CUDA {failure or _triton.missing or 'it has no Triton kernel'}" if cuda == "reference" else ""
        table[name] = entry | {"cuda": cuda, "reason": entry["reason"] + why}
    return table


def _loss_fake(student, *_):
    return student.new_empty((), dtype=accumulator(student.dtype))


def _with_grad_fake(student, *_):
    return student.new_empty((), dtype=accumulator(student.dtype)), torch.empty_like(student)
