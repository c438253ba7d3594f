"""Whether blocks do what their network does."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from stablekd_fast.blocks.modes import evaluation_mode, untouched
from stablekd_fast.errors import CutError, ModelError, first_line
from stablekd_fast.models.outputs import logits_of

_GRADIENT_TOLERANCE = {True: 1e-8, False: 1e-2}
"""A share of a parameter's largest gradient, in float64 and otherwise: sums of several uses may be added up in another
order, and batch norms of two images make much of it."""
_MODES = {False: "eval", True: "train"}


def run_through(blocks: Sequence[nn.Module], images: Tensor) -> list[Tensor]:
    """Return the output of every block."""
    outputs = [images]
    for block in blocks:
        outputs.append(block(outputs[-1]))
    return outputs[1:]


def check_runs(model: nn.Module, images: Tensor, training: bool = False) -> Tensor:
    """Return a model's logits, or its embedding, for the first two images, or the one that there is; the model is as it
    was before.

    Raises ModelError if it cannot compute them, or gives no tensor `[N, ...]`.
    """
    name, count = type(model).__name__, len(images[:2])
    try:
        with untouched(model), evaluation_mode(model):
            model.train(training)
            logits = logits_of(model(images[:2].clone()))
    except ModelError:  # it has said why itself
        raise
    except Exception as error:
        reason = first_line(error)
        what = f"{count} image(s) of the shape {list(images.shape[1:])} in {_MODES[training]} mode"
        raise ModelError(
            f"{name} cannot compute {what} ({reason}). Give it images of the size, the channels and the number that it "
            "was made for, or make it for these."
        ) from error
    if not isinstance(logits, Tensor) or logits.dim() < 2 or len(logits) != count:
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(
            f"{name} gives {got} for {count} image(s), but logits [{count}, classes] or an embedding [{count}, ...] "
            "are needed."
        )
    return logits


def check_separate(teacher: nn.Module, student: nn.Module) -> None:
    """Raise CutError if training the student would change the teacher: its parameters, or buffers such as a batch
    norm's running statistics."""
    if teacher is student:
        raise CutError(
            "The same module was given as teacher and as student, so that training would change the teacher too. "
            "Give two: copy.deepcopy(teacher) makes another one with the same weights."
        )
    theirs = {tensor.untyped_storage().data_ptr(): name for _, name, tensor in _tensors(teacher)}
    for kind, name, tensor in _tensors(student):
        place = tensor.untyped_storage().data_ptr()
        if place and place in theirs:
            raise CutError(
                f"The student's {kind} {name} and the teacher's {theirs[place]} share their memory, so that "
                "training would change the teacher too. Make one of the networks anew, or copy it with copy.deepcopy."
            )


def _tensors(network: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """All that a network holds, with kind and name."""
    for kind, found in (("parameter", network.named_parameters()), ("buffer", network.named_buffers())):
        yield from ((kind, name, tensor) for name, tensor in found)


def check_disjoint(student: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Raise CutError if a parameter of the student lies in two blocks."""
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    owner: dict[int, int] = {}
    for k, block in enumerate(blocks):
        for parameter in block.parameters():
            if owner.setdefault(id(parameter), k) != k:
                raise CutError(
                    f"The parameter {names.get(id(parameter), '?')!r} is used in blocks {owner[id(parameter)]} and "
                    f"{k}; blocks that train alone cannot share parameters. Move the cut so that one block holds all "
                    "its uses."
                )


def check_evaluation(model: nn.Module, blocks: Sequence[nn.Module], images: Tensor, role: str) -> None:
    """Raise CutError if the blocks one after the other do not give the model's own output in eval mode, to the bit.

    Raises ModelError if the model itself cannot compute the images, or gives no logits.
    """
    with untouched(model):
        torch.manual_seed(0)
        plain = check_runs(model, images)
    with evaluation_mode(nn.ModuleList(blocks)), untouched(model):
        torch.manual_seed(0)
        composed = run_through(blocks, images[:2].clone())[-1]
    if not plain.isfinite().all():
        raise CutError(
            f"The {role}'s outputs on the example input are not finite: {_what_is_not_finite(model)}. Load weights "
            "of a trained network, or look at how images are normalised."
        )
    _check_outputs(plain, composed, role, False)


def check_training(student: nn.Module, blocks: Sequence[nn.Module], images: Tensor) -> None:
    """Raise CutError if in train mode the blocks, joined to one network, give another output than the student, or one
    of its parameters another gradient.

    Both are computed in float64, in which the order of a sum hardly shows; where a network cannot, in its own type.
    """
    names = [name for name, parameter in student.named_parameters() if parameter.requires_grad]
    exact = True
    try:
        with in_float64(nn.ModuleList([student, *blocks])):
            (plain, theirs), (composed, ours) = _trained(student, blocks, images.double())
    except ModelError:
        exact = False
        (plain, theirs), (composed, ours) = _trained(student, blocks, images)
    _check_outputs(plain, composed, "student", True)
    idle = [name for name, one, other in zip(names, theirs, ours) if one is None and other is None]
    if idle:
        more = f" and {len(idle) - 1} others" if len(idle) > 1 else ""
        warnings.warn(
            f"The student's output does not depend on {idle[0]}{more}, such as an auxiliary head has: these parameters "
            "stay as they are.",
            stacklevel=3,
        )
    share = _GRADIENT_TOLERANCE[exact]
    largest = max((float(gradient.abs().max()) for gradient in theirs if gradient is not None), default=0.0)
    for name, one, other in zip(names, theirs, ours):
        if (one is None) != (other is None) or (
            one is not None and other is not None and not _close(one, other, share, largest)
        ):
            raise CutError(
                f"The student's parameter {name} gets another gradient through the blocks than through the student "
                "itself. Cut at other places, or give block lists that compose to the student exactly."
            )


Trained = tuple[Tensor, tuple[Tensor | None, ...]]


def _trained(student: nn.Module, blocks: Sequence[nn.Module], images: Tensor) -> tuple[Trained, Trained]:
    """Output in train mode, and gradient of each parameter that is trained: the student's, and the blocks'.

    Raises ModelError if the student cannot be trained on such images.
    """
    images = images[:2] if len(images) > 1 else images[:1].expand(2, *images.shape[1:])  # batch norms need two
    holder = nn.ModuleList([student, *blocks])
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]

    def once(run: Callable[[Tensor], Tensor]) -> Trained:
        with evaluation_mode(holder), untouched(student), torch.enable_grad():
            holder.train()
            torch.manual_seed(0)
            output = run(images.clone())
            return output.detach(), _gradients(output, parameters)

    try:
        return once(lambda x: logits_of(student(x))), once(lambda x: run_through(blocks, x)[-1])
    except RuntimeError as error:
        raise ModelError(f"{type(student).__name__} cannot be trained: {first_line(error)}") from error


def _gradients(output: Tensor, parameters: list[nn.Parameter]) -> tuple[Tensor | None, ...]:
    if not output.requires_grad:
        return (None,) * len(parameters)
    # Not all classes alike: a network that ends in a softmax would have no gradient.
    weights = torch.linspace(-1, 1, output.shape[-1], device=output.device, dtype=output.dtype)
    return torch.autograd.grad((output * weights).sum(), parameters, allow_unused=True)


def _close(one: Tensor, other: Tensor, share: float, largest: float) -> bool:
    """Whether gradients differ by less than a share of the parameter's own, or what is nothing beside the network's
    `largest`: a bias that a batch norm follows has only rounding errors."""
    return bool((one - other).abs().max() <= share * one.abs().max() + 1e-3 * share * largest)


def _check_outputs(plain: Tensor, composed: Tensor, role: str, training: bool) -> None:
    if plain.shape != composed.shape or not torch.equal(plain, composed):
        raise CutError(
            f"The {role}'s blocks do not compose to the {role}: outputs differ in {_MODES[training]} mode on the "
            "example input. Cut at other places, or give block lists that compose to the model exactly."
        )


@contextlib.contextmanager
def in_float64(network: nn.Module) -> Iterator[None]:
    """A context in which a network computes in float64, with parameters and buffers of its own for that time."""
    holders = [held for module in network.modules() for held in (module._parameters, module._buffers)]
    unique = {id(held): held for held in holders}.values()
    saved = [(held, dict(held)) for held in unique]
    doubles: dict[int, Tensor] = {}
    for held in unique:
        for name, tensor in held.items():
            if tensor is not None and tensor.is_floating_point():
                if id(tensor) not in doubles:
                    double = tensor.detach().double()
                    parameter = isinstance(tensor, nn.Parameter)
                    doubles[id(tensor)] = nn.Parameter(double, tensor.requires_grad) if parameter else double.clone()
                held[name] = doubles[id(tensor)]  # pyright: ignore
    try:
        yield
    finally:
        for held, before in saved:
            held.update(before)  # pyright: ignore[reportCallIssue, reportArgumentType]


def _what_is_not_finite(model: nn.Module) -> str:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            return f"its {name} holds NaN or infinite numbers"
    return "its weights are finite, but too large"
