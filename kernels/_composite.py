"""Losses that are compositions of torch's own operators, which `torch.compile` fuses and autograd differentiates."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stablekd_fast.kernels._checks import Given, check_upstream, laid_out_like, scaled


def loss_with_grad(
    loss: Callable[[Given], Tensor], given: Given, factor: float, upstream: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return `factor * upstream * loss(given)` and its gradient with respect to the student, laid out like it.

    The student is the first operand.
    """
    check_upstream(upstream, given[0])
    student, *others = (value.detach() if isinstance(value, Tensor) else value for value in given)
    with torch.enable_grad():
        student.requires_grad_()
        value = scaled(factor * loss(given._make((student, *others))), upstream)
        (gradient,) = torch.autograd.grad(value, student)
    return value.detach(), laid_out_like(gradient, given[0])
