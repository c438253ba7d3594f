"""Distillation of standardised logits (Sun et al., Logit Standardization in Knowledge Distillation, CVPR 2024: arXiv
2403.01876).

Each sample's logits are brought to mean 0 and standard deviation 1, the student's and the teacher's, before they are
divided by the temperature. The authors' code has further terms on strongly augmented images, which are not part of the
method that the paper names; their weight of 9 is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from stablekd_fast import kernels
from stablekd_fast.errors import check_range
from stablekd_fast.objectives.methods import Method, add_method
from stablekd_fast.objectives.registry import differentiated, register


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


def standardised(logits: Tensor) -> Tensor:
    """Return logits `[N, C]` with mean 0 and (unbiased) standard deviation 1 in each row."""
    return (logits - logits.mean(1, keepdim=True)) / (logits.std(1, keepdim=True) + 1e-7)


@register("logits", "logit-std", LogitStandardization)
@differentiated
def logit_standardization(
    config: LogitStandardization, student: Tensor, teacher: Tensor, labels: Tensor | None
) -> Tensor:
    """Return the loss of logits `[N, C]`, with labels int64 `[N]`, or probabilities `[N, C]`."""
    divergence = kernels.kd_loss(standardised(student), standardised(teacher), temperature=config.temperature)
    loss = config.kl_weight * divergence
    return loss if labels is None else loss + config.ce_weight * F.cross_entropy(student, labels)


add_method("logit-std", Method(logits="logit-std"))
