"""Contrastive distillation of embeddings (Wu et al., DisCo / DistilCSE: arXiv 2112.05638).

InfoNCE: the student's embedding of a sample is to lie nearer to the teacher's embedding of the same sample than to the
teacher's embeddings of the other samples of the batch and of a queue of earlier ones. The arithmetic is that of
`stablekd_fast.losses.ContrastiveLoss`. Where ranks divide the batch, each contrasts its samples with those of all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from stablekd_fast.errors import check_range
from stablekd_fast.losses import ContrastiveLoss
from stablekd_fast.objectives.auxiliary import Auxiliary, Facts, Network, StepBatch, embedding, last_cut
from stablekd_fast.objectives.methods import Method, add_method
from stablekd_fast.objectives.registry import register


@dataclass(frozen=True)
class CKD:
    """`weight` * mean of -log(exp(s.t / T) / sum over teachers' embeddings of exp(s.t' / T)), of unit vectors s, t."""

    weight: float = 1.0
    """Weight of the loss."""
    temperature: float = 0.05
    """What cosines are divided by."""
    queue: int = 2048
    """How many earlier embeddings of the teacher are kept; 0 for the batch alone."""

    def __post_init__(self) -> None:
        check_range(self, "weight", "temperature", above=0)
        check_range(self, "queue", least=0)


@register("auxiliary", "ckd", CKD)
class Contrast(Auxiliary):
    """Embeddings are means over places at the last cut. Where widths differ, a learned linear map takes the student's
    to the teacher's width; it is left out of the export."""

    relates = True
    gathers = True
    any_width = True

    def __init__(self, config: CKD, facts: Facts) -> None:
        super().__init__(config, facts)
        self.cut = last_cut("ckd", facts.cuts)
        own, theirs = facts.widths(self.cut)
        self.map = nn.Identity() if own == theirs else nn.Linear(own, theirs, bias=False)
        self.contrast = ContrastiveLoss(theirs, config.temperature, config.queue)

    @classmethod
    def teacher_outputs(cls, config: Any, cuts: int) -> set[int]:
        return {last_cut("ckd", cuts)}

    @classmethod
    def student_outputs(cls, config: Any, cuts: int) -> set[int]:
        return {last_cut("ckd", cuts)}

    def forward(self, batch: StepBatch, student: dict[int, Tensor], network: Network) -> Tensor:
        axis = self.facts.channel_axes[self.cut]
        own, theirs = embedding(student[self.cut], axis), embedding(batch.targets[self.cut], axis)
        self.contrast.gather = self.gather
        return self.config.weight * self.contrast(self.map(own), theirs)


add_method("ckd", Method(auxiliary="ckd", options={"logits": {"kl_weight": 0.0}}))
