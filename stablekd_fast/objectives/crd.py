"""Contrastive representation distillation (Tian et al., CRD, ICLR 2020: arXiv 1910.10699).

Noise-contrastive estimation between projected, normalised embeddings of student and teacher, against memories of both
over all samples, as in the authors' code: critics exp(v.m / T) / Z with Z fixed by the first step, memories updated
with momentum. Negatives are drawn from all samples alike, also of the same class ("relax" there); their number is
smaller here by default than the authors' 16,384, which is a product with 16,385 vectors per image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stablekd_fast.errors import check_range
from stablekd_fast.objectives.auxiliary import Auxiliary, Facts, Network, StepBatch, embedding, last_cut
from stablekd_fast.objectives.methods import Method, add_method
from stablekd_fast.objectives.registry import register

_SMALL = 1e-7


@dataclass(frozen=True)
class CRD:
    """`weight` * the two contrastive losses, with the student's and with the teacher's embedding as anchor."""

    weight: float = 0.8
    """Weight of both losses."""
    dimensions: int = 128
    """Size of the projected embeddings."""
    negatives: int = 1024
    """Samples that each is contrasted with."""
    temperature: float = 0.07
    """What products of embeddings are divided by."""
    momentum: float = 0.5
    """How much of its old embedding a sample keeps in memory when it is seen."""

    def __post_init__(self) -> None:
        check_range(self, "weight", "temperature", above=0)
        check_range(self, "dimensions", "negatives", least=1)
        check_range(self, "momentum", least=0, most=1)


@register("auxiliary", "crd", CRD)
class ContrastiveRepresentation(Auxiliary):
    """It learns both projections, and remembers embeddings of all samples."""

    reads_ids = True
    relates = True
    any_width = True

    def __init__(self, config: CRD, facts: Facts) -> None:
        super().__init__(config, facts)
        self.cut = last_cut("crd", facts.cuts)
        self.student, self.teacher = (nn.Linear(width, config.dimensions) for width in facts.widths(self.cut))
        reach = 1 / math.sqrt(config.dimensions / 3)
        for name in ("students", "teachers"):
            self.register_buffer(name, torch.rand(facts.samples, config.dimensions) * 2 * reach - reach)
        self.register_buffer("constants", torch.full((2,), -1.0))
        self.students: Tensor
        self.teachers: Tensor
        self.constants: Tensor

    @classmethod
    def teacher_outputs(cls, config: Any, cuts: int) -> set[int]:
        return {last_cut("crd", cuts)}

    @classmethod
    def student_outputs(cls, config: Any, cuts: int) -> set[int]:
        return {last_cut("crd", cuts)}

    def forward(self, batch: StepBatch, student: dict[int, Tensor], network: Network) -> Tensor:
        assert batch.ids is not None
        axis = self.facts.channel_axes[self.cut]
        own = F.normalize(self.student(embedding(student[self.cut], axis)), dim=1)
        theirs = F.normalize(self.teacher(embedding(batch.targets[self.cut], axis)), dim=1)
        drawn = torch.randint(self.facts.samples, (len(own), self.config.negatives), device=own.device)
        loss = self.contrast(own, theirs, torch.cat([batch.ids[:, None], drawn], 1))
        with torch.no_grad():
            for memory, new in ((self.students, own), (self.teachers, theirs)):
                kept = self.config.momentum * memory[batch.ids] + (1 - self.config.momentum) * new
                memory.index_copy_(0, batch.ids, F.normalize(kept, dim=1))
        return self.config.weight * loss

    def contrast(self, own: Tensor, theirs: Tensor, places: Tensor) -> Tensor:
        """Return both losses of unit vectors `[N, D]`, where `places` int64 `[N, 1 + negatives]` are those of each
        sample in the memories, and those of its negatives."""
        loss = torch.zeros((), device=own.device)
        for side, (anchor, memory) in enumerate(((own, self.teachers), (theirs, self.students))):
            raw = torch.einsum("nkd,nd->nk", memory[places], anchor).div(self.config.temperature).exp()
            with torch.no_grad():
                first = raw.mean() * self.facts.samples
                constant = torch.where(self.constants[side] > 0, self.constants[side], first).clone()
                self.constants[side].copy_(constant)
            loss = loss + nce(raw / constant, self.facts.samples)
        return loss


def nce(critics: Tensor, samples: int) -> Tensor:
    """Return the noise-contrastive loss of critics `[N, 1 + M]`, of the positive and of M uniform draws from so many
    samples."""
    noise = (critics.shape[1] - 1) / samples
    positive = (critics[:, 0] / (critics[:, 0] + noise + _SMALL)).log()
    negative = (noise / (critics[:, 1:] + noise + _SMALL)).log()
    return -(positive.sum() + negative.sum()) / len(critics)


add_method("crd", Method(auxiliary="crd", options={"logits": {"kl_weight": 0.0}}))
