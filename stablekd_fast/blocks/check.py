"""Whether blocks do what their network does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stablekd_fast.blocks.modes import evaluation_mode, untouched
from stablekd_fast.errors import CutError, ModelError, first_line
from stablekd_fast.models.outputs import logits_of

_GRADIENT_TOLERANCE = 1e-3
"""A share of a parameter's largest gradient: sums of several uses may be added up in another order."""
_MODES = {False: "eval", True: "train"}


def run_through(blocks: Sequence[nn.Module], images: Tensor) -> list[Tensor]:
    """Return the output of every block."""
    outputs = [images]
    for block in blocks:
        outputs.append(block(outputs[-1]))
    return outputs[1:]


def check_runs(model: nn.Module, images: Tensor, training: bool = False) -> Tensor:
    """Return a model's logits for the first two images, or the one that there is; the model is as it was before.

    Raises ModelError if it cannot compute them, or gives no logits `[N, classes]`.
    """
    name, count = type(model).__name__, len(images[:2])
    try:
        with untouched(model), evaluation_mode(model):
            model.train(training)
            logits = logits_of(model(images[:2].clone()))
    except Exception as error:
        reason = first_line(error)
        what = f"{count} image(s) of the shape {list(images.shape[1:])} in {_MODES[training]} mode"
        raise ModelError(
            f"{name} cannot compute {what} ({reason}). Give it images of the size, the channels and the number that it "
            "was made for, or make it for these."
        ) from error
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != count:
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(f"{name} gives {got} for {count} image(s), but logits [{count}, classes] are needed.")
    return logits


def check_separate(teacher: nn.Module, student: nn.Module) -> None:
    """Raise CutError if training the student would change the teacher."""
    if teacher is student:
        raise CutError(
            "The same module was given as teacher and as student, so that training would change the teacher too. "
            "Give two: copy.deepcopy(teacher) makes another one with the same weights."
        )
    theirs = {tensor.untyped_storage().data_ptr(): name for name, tensor in teacher.state_dict().items()}
    for name, tensor in student.named_parameters():
        place = tensor.untyped_storage().data_ptr()
        if place and place in theirs:
            raise CutError(
                f"The student's parameter {name} and the teacher's {theirs[place]} share their memory, so that "
                "training would change the teacher too. Make one of the networks anew, or copy it with copy.deepcopy."
            )


def check_disjoint(student: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Raise CutError if a parameter of the student lies in two blocks, or in none."""
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
    unused = [name for key, name in names.items() if key not in owner]
    if unused:
        raise CutError(
            f"The student's parameters {unused[:3]} belong to no block. Give block lists that compose to the student, "
            "or remove parameters that its forward does not use."
        )


def check_composition(
    model: nn.Module, blocks: Sequence[nn.Module], images: Tensor, role: str, modes: Sequence[bool]
) -> None:
    """Raise CutError if the blocks one after the other do not give the model's own output, to the bit, in one of the
    `modes` (whether the model trains)."""
    for mode in modes:
        plain, composed = _both(model, blocks, images, mode)
        if not plain.isfinite().all():
            raise CutError(
                f"The {role}'s logits on the example input are not finite: {_what_is_not_finite(model)}. Load weights "
                "of a trained network, or look at how images are normalised."
            )
        if plain.shape != composed.shape or not torch.equal(plain, composed):
            raise CutError(
                f"The {role}'s blocks do not compose to the {role}: outputs differ in {_MODES[mode]} mode on the "
                "example input. Cut at other places, or give block lists that compose to the model exactly."
            )


def check_gradients(student: nn.Module, blocks: Sequence[nn.Module], images: Tensor) -> None:
    """Raise CutError if a parameter of the student gets another gradient through the blocks, joined to one network,
    than through the student itself."""
    named = {name: parameter for name, parameter in student.named_parameters() if parameter.requires_grad}
    if not named:
        return

    def gradients(output: Tensor) -> tuple[Tensor | None, ...]:
        # Not all classes alike: a network that ends in a softmax would have no gradient.
        weights = torch.linspace(-1, 1, output.shape[-1], device=output.device, dtype=output.dtype)
        return torch.autograd.grad((output * weights).sum(), list(named.values()), allow_unused=True)

    found = _both(student, blocks, images, True, gradients)
    for name, plain, composed in zip(named, *found):
        if (plain is None) != (composed is None) or (plain is not None and not _close(plain, composed)):
            raise CutError(
                f"The student's parameter {name} gets another gradient through the blocks than through the student "
                "itself. Cut at other places, or give block lists that compose to the student exactly."
            )


def _both(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    images: Tensor,
    training: bool,
    then: Callable[[Tensor], Any] | None = None,
) -> tuple[Any, Any]:
    """The output of the model and that of its blocks, from the same random state, or what `then` makes of each with
    gradients; the model is as it was before."""
    images = images[:2] if len(images) > 1 else images[:1].expand(2, *images.shape[1:])  # batch norms need two
    holder = nn.ModuleList([model, *blocks])
    found = []
    for run in (lambda x: logits_of(model(x)), lambda x: run_through(blocks, x)[-1]):
        with evaluation_mode(holder), untouched(model), torch.set_grad_enabled(then is not None):
            holder.train(training)
            torch.manual_seed(0)
            output = run(images.clone())
            found.append(output if then is None else then(output))
    return found[0], found[1]


def _what_is_not_finite(model: nn.Module) -> str:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            return f"its {name} holds NaN or infinite numbers"
    return "its weights are finite, but too large"


def _close(plain: Tensor, composed: Tensor | None) -> bool:
    assert composed is not None
    return bool((plain - composed).abs().max() <= _GRADIENT_TOLERANCE * plain.abs().max())
