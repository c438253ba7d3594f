"""Distillation on mixed images without labels, where the teacher is least certain (Wang et al.: arXiv 2012.02909, v2
"What Makes a Good Data Augmentation in Knowledge Distillation": the picking).

The student learns from the teacher's answers alone, on mixed images. Of each batch it sees the part on which the
teacher's prediction has the highest entropy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stablekd_fast.errors import check_range
from stablekd_fast.objectives.auxiliary import Auxiliary, Network, StepBatch, wide
from stablekd_fast.objectives.methods import Method, add_method
from stablekd_fast.objectives.registry import register


@dataclass(frozen=True)
class EntropyPick:
    """It adds no loss of its own: it chooses which images the step trains on."""

    picked: float = 0.5
    """The fraction of each batch on which the student trains."""

    def __post_init__(self) -> None:
        check_range(self, "picked", above=0, most=1)


@register("auxiliary", "mix-kd", EntropyPick)
class Pick(Auxiliary):
    """The teacher answers for all images of a batch, the student for those picked."""

    relates = True
    needs_mix = True

    @classmethod
    def teacher_outputs(cls, config: Any, cuts: int) -> set[int]:
        return {cuts}

    def prepare(self, batch: StepBatch) -> StepBatch:
        """Return the part of the batch that is picked, in its order."""
        log_p = torch.log_softmax(wide(batch.targets[self.facts.cuts]), 1)
        entropy = -(log_p.exp() * log_p).sum(1)
        count = max(round(self.config.picked * len(entropy)), 1)
        return batch.of(torch.topk(entropy, count).indices.sort().values)

    def forward(self, batch: StepBatch, student: dict[int, Tensor], network: Network) -> Tensor:
        return torch.zeros((), device=batch.entry.device)


add_method("mix-kd", Method(auxiliary="mix-kd", options={"logits": {"kl_weight": 1.0, "ce_weight": 0.0}}))
