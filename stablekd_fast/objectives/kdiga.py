"""Alignment of input gradients, for students that withstand attacks as their teacher does (Shao et al., KDIGA: arXiv
2110.12072).

The loss is (1 - a) * CE + a * T^2 * KL + g / b * |dCE_student/dx - dCE_teacher/dx|, with b images in a batch, gradients
of the mean cross entropy, and the length taken over the whole batch. Whether the authors' code takes it per image could
not be verified.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from stablekd_fast.errors import ConfigError, check_range
from stablekd_fast.objectives.auxiliary import Auxiliary, Facts, Network, StepBatch, wide
from stablekd_fast.objectives.methods import Method, add_method
from stablekd_fast.objectives.registry import register


@dataclass(frozen=True)
class KDIGA:
    """`weight` / b times the distance of the input gradients of student and teacher."""

    weight: float = 1000.0
    """Weight of the distance."""

    def __post_init__(self) -> None:
        check_range(self, "weight", above=0)


@register("auxiliary", "kdiga", KDIGA)
class InputGradients(Auxiliary):
    """The teacher runs live in each step, forward and backward: rows of a cache have no gradient."""

    reads_input_gradient = True
    relates = True
    needs_classes = True

    def __init__(self, config: KDIGA, facts: Facts) -> None:
        super().__init__(config, facts)
        if facts.teacher is None:
            raise ConfigError("kdiga needs a teacher that can be differentiated; this run has none.")

    def forward(self, batch: StepBatch, student: dict[int, Tensor], network: Network) -> Tensor:
        assert batch.labels is not None and self.facts.teacher is not None
        own = self._gradient(student[self.facts.cuts], batch.entry, batch.labels, create_graph=True)
        images = wide(batch.entry.detach()).requires_grad_(True)
        theirs = self._gradient(self.facts.teacher(images), images, batch.labels, create_graph=False)
        distance = (wide(own) - theirs.detach()).square().sum()
        return self.config.weight / len(own) * (distance + 1e-20).sqrt()

    @staticmethod
    def _gradient(logits: Tensor, images: Tensor, labels: Tensor, *, create_graph: bool) -> Tensor:
        loss = F.cross_entropy(wide(logits), labels)
        return torch.autograd.grad(loss, images, create_graph=create_graph)[0]


add_method(
    "kdiga",
    Method(auxiliary="kdiga", options={"logits": {"temperature": 1.0, "kl_weight": 0.5, "ce_weight": 0.5}}),
)
