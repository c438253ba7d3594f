"""Losses that are compositions of torch's own operators: `torch.compile` fuses them, and autograd differentiates
them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from stablekd_fast.kernels._checks import check_upstream, laid_out_like, scaled
from torch import Tensor


def loss_with_grad(
    loss: Callable[[Tensor], Tensor], student: Tensor, factor: float, upstream: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`factor * upstream * loss(student)` and its gradient with respect to the student, laid out like it."""
    check_upstream(upstream, student)
    with torch.enable_grad():
        leaf = student.detach().requires_grad_()
        value = scaled(factor * loss(leaf), upstream)
        (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), laid_out_like(gradient, student)
