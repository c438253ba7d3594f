"""Confidence-conditioned distillation (Mishra and Sundaram, CCKD: arXiv 2107.06993).

The teacher's probability of the label, p, says for each sample how much of the teacher to take. `loss`: (1 - p) * cross
entropy with the label + p * T^2 * KL. `target`: cross entropy with (1 - p) * label + p * the teacher's prediction at
temperature T. Samples that the student has learnt drop out of the loss. The authors' exact rule for that could not be
verified; here a sample rests from the next time on that it is seen, as long as the student gives its label at least the
probability `learnt`, or more than the teacher does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from stablekd_fast.errors import check_range
from stablekd_fast.objectives.auxiliary import Auxiliary, Facts, Network, StepBatch, wide
from stablekd_fast.objectives.methods import Method, add_method
from stablekd_fast.objectives.registry import register


@dataclass(frozen=True)
class CCKD:
    """The loss is averaged over all samples of the batch, those that rest counted as 0."""

    variant: Literal["loss", "target"] = "loss"
    """Whether the teacher's confidence weights losses or targets."""
    temperature: float = 4.0
    """What logits are divided by before they are compared."""
    learnt: float = 0.99
    """The student's probability of the label from which a sample rests; 1 has none rest."""

    def __post_init__(self) -> None:
        check_range(self, "temperature", "learnt", above=0)
        check_range(self, "learnt", most=1)


@register("auxiliary", "cckd", CCKD)
class ConfidenceConditioned(Auxiliary):
    """It remembers for each sample whether it is learnt."""

    reads_ids = True
    relates = True
    needs_classes = True

    def __init__(self, config: CCKD, facts: Facts) -> None:
        super().__init__(config, facts)
        self.register_buffer("learnt", torch.zeros(facts.samples))
        self.learnt: Tensor

    @classmethod
    def teacher_outputs(cls, config: Any, cuts: int) -> set[int]:
        return {cuts}

    def forward(self, batch: StepBatch, student: dict[int, Tensor], network: Network) -> Tensor:
        config, head = self.config, self.facts.cuts
        assert batch.labels is not None and batch.ids is not None
        logits, teacher, labels = wide(student[head]), wide(batch.targets[head]), batch.labels
        confidence = torch.softmax(teacher, 1).gather(1, labels[:, None])[:, 0]
        terms = conditioned(config.variant, logits, teacher, labels, confidence, config.temperature)
        takes_part = 1 - self.learnt[batch.ids]
        with torch.no_grad():
            own = torch.softmax(logits, 1).gather(1, labels[:, None])[:, 0]
            rests = ((own >= config.learnt) | (own > confidence)) & (config.learnt < 1)
            self.learnt.index_copy_(0, batch.ids, rests.to(self.learnt.dtype))
        return (takes_part * terms).mean()


def conditioned(
    variant: str, logits: Tensor, teacher: Tensor, labels: Tensor, confidence: Tensor, temperature: float
) -> Tensor:
    """Return the loss of each sample `[N]`, of logits `[N, C]`, labels int64 `[N]` and the teacher's `confidence`
    `[N]`."""
    soft = torch.softmax(teacher / temperature, 1)
    if variant == "target":
        part = confidence[:, None]
        target = part * soft + (1 - part) * F.one_hot(labels, logits.shape[1]).to(logits.dtype)
        return F.cross_entropy(logits, target, reduction="none")
    cross_entropy = F.cross_entropy(logits, labels, reduction="none")
    divergence = F.kl_div(torch.log_softmax(logits / temperature, 1), soft, reduction="none").sum(1)
    return (1 - confidence) * cross_entropy + confidence * temperature**2 * divergence


add_method("cckd", Method(logits="none", auxiliary="cckd"))
