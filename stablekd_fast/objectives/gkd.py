"""Grouped knowledge distillation and cross entropy at the head (Zhao et al., AAAI 2023: arXiv 2304.04462)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from stablekd_fast import kernels
from stablekd_fast.errors import ConfigError, check_range
from stablekd_fast.objectives.kd import with_cross_entropy
from stablekd_fast.objectives.methods import Method, add_method
from stablekd_fast.objectives.registry import register


@dataclass(frozen=True)
class GKD:
    """`weight` * T^2 * (`binary_weight` * KL_binary + `primary_weight` * P * KL_primary) + `ce_weight` * cross entropy
    with the labels. The primary group of an image holds the classes most probable for the teacher, P is its share of
    them; what lies between the other classes is not distilled."""

    temperature: float = 4.0
    """What both logits are divided by before they are compared."""
    threshold: float = 0.9
    """The teacher's probability that the classes of the primary group reach together."""
    primary_weight: float = 1.0
    """Weight of the divergence inside the primary group."""
    binary_weight: float = 1.0
    """Weight of the divergence between the two groups."""
    weight: float = 1.0
    """Weight of both divergences."""
    ce_weight: float = 1.0
    """Weight of the cross entropy with the labels."""

    def __post_init__(self) -> None:
        check_range(self, "temperature", above=0)
        check_range(self, "primary_weight", "binary_weight", "weight", "ce_weight", least=0)
        if not 0 < self.threshold < 1:
            raise ConfigError(f"threshold={self.threshold} was given; it must be between 0 and 1.")


@register("logits", "gkd", GKD)
def gkd(
    config: GKD, student: Tensor, teacher: Tensor, labels: Tensor, upstream: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return loss and gradient, both times `upstream`. Labels are int64 `[N]`, or probabilities `[N, classes]`."""
    divergence = kernels.grouped_kl_with_grad(
        student,
        teacher,
        temperature=config.temperature,
        threshold=config.threshold,
        primary_weight=config.primary_weight,
        binary_weight=config.binary_weight,
        scale=config.weight,
        upstream=upstream,
    )
    return with_cross_entropy(divergence, student, labels, config.ce_weight, upstream)


add_method("gkd", Method(logits="gkd"))
