"""Decoupled knowledge distillation and cross entropy at the head (Zhao et al., CVPR 2022: arXiv 2203.08679)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from stablekd_fast import kernels
from stablekd_fast.errors import check_range
from stablekd_fast.objectives.kd import with_cross_entropy
from stablekd_fast.objectives.methods import Method, add_method
from stablekd_fast.objectives.registry import register


@dataclass(frozen=True)
class DKD:
    """`weight` * T^2 * (`alpha` * TCKD + `beta` * NCKD) + `ce_weight` * cross entropy with the labels."""

    temperature: float = 4.0
    """What both logits are divided by before they are compared."""
    alpha: float = 1.0
    """Weight of the divergence between label and all other classes."""
    beta: float = 8.0
    """Weight of the divergence over the other classes alone."""
    weight: float = 1.0
    """Weight of both divergences."""
    ce_weight: float = 1.0
    """Weight of the cross entropy with the labels."""

    def __post_init__(self) -> None:
        check_range(self, "temperature", above=0)
        check_range(self, "alpha", "beta", "weight", "ce_weight", least=0)


@register("logits", "dkd", DKD, needs_classes=True)
def dkd(
    config: DKD, student: Tensor, teacher: Tensor, labels: Tensor, upstream: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return loss and gradient, both times `upstream`. Labels are int64 `[N]`."""
    divergence = kernels.decoupled_kl_with_grad(
        student,
        teacher,
        labels,
        temperature=config.temperature,
        alpha=config.alpha,
        beta=config.beta,
        scale=config.weight,
        upstream=upstream,
    )
    return with_cross_entropy(divergence, student, labels, config.ce_weight, upstream)


add_method("dkd", Method(logits="dkd"))
