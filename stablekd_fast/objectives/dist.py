"""Correlation with the teacher's prediction, by sample and by class (Huang et al., DIST, NeurIPS 2022: arXiv
2205.10536)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from stablekd_fast import kernels
from stablekd_fast.errors import check_range
from stablekd_fast.objectives.kd import with_cross_entropy
from stablekd_fast.objectives.methods import Method, add_method
from stablekd_fast.objectives.registry import register


@dataclass(frozen=True)
class DIST:
    """T^2 * (`inter` * (1 - correlation of a sample's classes) + `intra` * (1 - correlation of a class's samples)),
    each averaged, + `ce_weight` * cross entropy with the labels."""

    temperature: float = 1.0
    """What both logits are divided by before they are compared."""
    inter: float = 1.0
    """Weight of the relations between the classes of a sample."""
    intra: float = 1.0
    """Weight of the relations between the samples of a batch in a class."""
    ce_weight: float = 1.0
    """Weight of the cross entropy with the labels."""

    def __post_init__(self) -> None:
        check_range(self, "temperature", above=0)
        check_range(self, "inter", "intra", "ce_weight", least=0)


@register("logits", "dist", DIST, relates=True)
def dist(
    config: DIST, student: Tensor, teacher: Tensor, labels: Tensor | None, upstream: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return loss and gradient, both times `upstream`."""
    distance = kernels.correlation_with_grad(
        student,
        teacher,
        temperature=config.temperature,
        inter=config.inter,
        intra=config.intra,
        upstream=upstream,
    )
    return with_cross_entropy(distance, student, labels, config.ce_weight, upstream)


add_method("dist", Method(logits="dist"))
