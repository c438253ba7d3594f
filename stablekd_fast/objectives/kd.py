"""Hinton distillation and cross entropy at the head (arXiv 1503.02531)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stablekd_fast import kernels
from stablekd_fast.errors import ConfigError
from stablekd_fast.objectives.registry import register


@dataclass(frozen=True)
class LogitKD:
    """`kl_weight` * T^2 * KL(teacher || student at temperature T) + `ce_weight` * cross entropy with the labels."""

    temperature: float = 4.0
    """What both logits are divided by before they are compared."""
    kl_weight: float = 0.1
    """Weight of the divergence from the teacher's prediction."""
    ce_weight: float = 1.0
    """Weight of the cross entropy with the labels."""
    label_smoothing: float = 0.0
    """The part of a label that is spread evenly over all classes."""

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ConfigError(f"temperature={self.temperature} was given; it must be greater than 0.")
        if self.kl_weight < 0 or self.ce_weight < 0 or self.kl_weight + self.ce_weight == 0:
            raise ConfigError(
                f"kl_weight={self.kl_weight} and ce_weight={self.ce_weight} were given; "
                "they must not be negative, and one must be greater than 0."
            )


@register("logits", "kd", LogitKD)
def logit_kd(
    config: LogitKD, student: Tensor, teacher: Tensor | None, labels: Tensor | None, upstream: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return loss and gradient, both times `upstream`: the cross entropy alone without teacher logits, the divergence
    alone without labels.

    Labels are int64 `[N]`, or probabilities `[N, C]`.
    """
    kl_weight = config.kl_weight if teacher is not None else 0.0
    ce_weight = config.ce_weight if labels is not None else 0.0
    total = kl_weight + ce_weight
    if teacher is None or kl_weight == 0.0:
        assert labels is not None
        return _cross_entropy(student, labels, ce_weight, config.label_smoothing, upstream)
    if labels is not None and ce_weight and labels.is_floating_point():
        cross_entropy, ce_gradient = _cross_entropy(student, labels, ce_weight, config.label_smoothing, upstream)
        divergence, kl_gradient = kernels.kd_loss_with_grad(
            student, teacher, temperature=config.temperature, scale=kl_weight, upstream=upstream
        )
        return cross_entropy + divergence, ce_gradient + kl_gradient
    return kernels.kd_loss_with_grad(
        student,
        teacher,
        labels if ce_weight else None,
        temperature=config.temperature,
        alpha=kl_weight / total,
        label_smoothing=config.label_smoothing,
        scale=total,
        upstream=upstream,
    )


def with_cross_entropy(
    divergence: tuple[Tensor, Tensor], student: Tensor, labels: Tensor | None, weight: float, upstream: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return a loss with gradient and, where there are labels, `weight` times the cross entropy added to it.

    Of a student that is its own teacher, with weight 0, only the cross entropy is left: with labels int64 `[N]` it is
    that of `kd_loss`, one pass where autograd takes ten.
    """
    if labels is None or weight == 0.0:
        return divergence
    if labels.is_floating_point():
        loss, gradient = _cross_entropy(student, labels, weight, 0.0, upstream)
    else:
        loss, gradient = kernels.kd_loss_with_grad(
            student, student, labels, temperature=1.0, alpha=0.0, scale=weight, upstream=upstream
        )
    return divergence[0] + loss, divergence[1] + gradient


def _cross_entropy(
    student: Tensor, labels: Tensor, weight: float, smoothing: float, upstream: Tensor | None
) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaf = student.detach().requires_grad_(True)
        loss = weight * nn.functional.cross_entropy(leaf, labels, label_smoothing=smoothing)
        if upstream is not None:
            loss = loss.float() * upstream
        (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient
