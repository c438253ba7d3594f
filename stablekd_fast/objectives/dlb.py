"""Self-distillation from the last mini-batch (Shen et al., DLB, CVPR 2022: arXiv 2203.16172).

In each step the student also sees the images of the step before, in another view, and is to predict what it predicted
for them then. As in the authors' code the two views go through the network one after the other, and the cross entropy
is the mean over both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from stablekd_fast import kernels
from stablekd_fast.errors import check_range
from stablekd_fast.objectives.auxiliary import Auxiliary, Facts, Network, StepBatch, wide
from stablekd_fast.objectives.methods import Method, add_method
from stablekd_fast.objectives.registry import register


@dataclass(frozen=True)
class DLB:
    """`weight` * T^2 * KL(last step's prediction || this step's) + half the cross entropy of the images seen again."""

    weight: float = 1.0
    """Weight of the divergence."""
    temperature: float = 3.0
    """What logits are divided by before they are compared."""

    def __post_init__(self) -> None:
        check_range(self, "weight", "temperature", above=0)


@register("auxiliary", "dlb", DLB)
class LastBatch(Auxiliary):
    """It remembers logits and labels of the last step; the first step of a run has none, and goes without."""

    relates = True
    needs_classes = True
    second = "last"

    def __init__(self, config: DLB, facts: Facts) -> None:
        super().__init__(config, facts)
        size = facts.batch_size
        self.register_buffer("logits", torch.zeros(size, facts.classes))
        self.register_buffer("labels", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("begun", torch.zeros(()))
        self.logits: Tensor
        self.labels: Tensor
        self.begun: Tensor

    def forward(self, batch: StepBatch, student: dict[int, Tensor], network: Network) -> Tensor:
        config, head = self.config, self.facts.cuts
        assert batch.second is not None and batch.labels is not None
        now, again = wide(student[head]), wide(network(batch.second)[head])
        repeated = kernels.kd_loss(again, self.logits.clone(), temperature=config.temperature)
        known = 0.5 * F.cross_entropy(again, self.labels.clone()) + config.weight * repeated
        loss = torch.where(self.begun.clone() > 0, known, 0.5 * F.cross_entropy(now, batch.labels))
        with torch.no_grad():
            self.logits.copy_(now)
            self.labels.copy_(batch.labels)
            self.begun.fill_(1.0)
        return loss


add_method("dlb", Method(auxiliary="dlb", options={"logits": {"ce_weight": 0.5}}, needs_teacher=False))
