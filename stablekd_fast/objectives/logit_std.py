"""Distillation of standardised logits (Sun et al., Logit Standardization in Knowledge Distillation, CVPR 2024: arXiv
2403.01876).

Each sample's logits are brought to mean 0 and standard deviation 1, the student's and the teacher's, before they are
divided by the temperature. The authors' code has further terms on strongly augmented images, which are not part of the
method that the paper names; their weight of 9 is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from stablekd_fast import kernels
from stablekd_fast.errors import check_range
from stablekd_fast.objectives.kd import with_cross_entropy
from stablekd_fast.objectives.methods import Method, add_method
from stablekd_fast.objectives.registry import register


@dataclass(frozen=True)
class LogitStandardization:
    """`kl_weight` * T^2 * KL between standardised logits at temperature T + `ce_weight` * cross entropy with the
    labels."""

    temperature: float = 2.0
    """What standardised logits are divided by."""
    kl_weight: float = 9.0
    """Weight of the divergence from the teacher's prediction."""
    ce_weight: float = 1.0
    """Weight of the cross entropy with the labels."""

    def __post_init__(self) -> None:
        check_range(self, "temperature", "kl_weight", above=0)
        check_range(self, "ce_weight", least=0)


@register("logits", "logit-std", LogitStandardization)
def logit_standardization(
    config: LogitStandardization,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    upstream: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return loss and gradient, both times `upstream`, of logits `[N, C]`, with labels int64 `[N]`, or probabilities
    `[N, C]`."""
    soft = labels is not None and labels.is_floating_point()
    found = kernels.standardised_kd_loss_with_grad(
        student,
        teacher,
        None if soft else labels,
        temperature=config.temperature,
        kl_weight=config.kl_weight,
        ce_weight=config.ce_weight,
        upstream=upstream,
    )
    return with_cross_entropy(found, student, labels, config.ce_weight, upstream) if soft else found


add_method("logit-std", Method(logits="logit-std"))
