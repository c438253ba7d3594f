"""Ranking distillation inside groups of items of like popularity (Chen et al., UnKD, WSDM 2023: arXiv 2211.14729).

A teacher of recommendations puts popular items too high, and a student that learns its whole ranking learns that bias
with it. Pairs of which both items lie in one group say which of two items of like popularity the user prefers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stablekd_fast.errors import ConfigError, check_range
from stablekd_fast.objectives.auxiliary import Auxiliary, Facts, Network, StepBatch
from stablekd_fast.objectives.methods import Method, add_method
from stablekd_fast.objectives.popularity import popularity_groups
from stablekd_fast.objectives.registry import register

_REACH = 12
"""So many depths of the list are looked at: of 160,000 items drawn one would lie deeper."""


@dataclass(frozen=True)
class UnKD:
    """`weight` times the mean over groups of the mean of -log sigmoid(score of i - score of j), over pairs of items of
    one group of which the teacher ranks i above j. The items of a user are left out."""

    weight: float = 4.0
    """Weight of the loss; a larger one finds more unpopular items, and fewer in all."""
    groups: int = 4
    """Groups of items with equally many interactions in all; 1 makes it plain ranking distillation."""
    pairs: int = 32
    """Pairs that are drawn for each user, in all groups together."""
    depth: float = 20.0
    """An item is drawn with a probability that falls by a factor of e with so many ranks of the teacher's list of its
    group."""

    def __post_init__(self) -> None:
        check_range(self, "weight", "depth", above=0)
        check_range(self, "groups", "pairs", least=1)
        if self.pairs < self.groups:
            raise ConfigError(f"pairs={self.pairs} was given; each of groups={self.groups} needs one at least.")


@register("auxiliary", "unkd", UnKD)
class UnbiasedRanking(Auxiliary):
    """Pairs are drawn anew in each step."""

    any_width = True
    items: Tensor
    """Items int64 `[items]`, group by group."""

    def __init__(self, config: UnKD, facts: Facts) -> None:
        super().__init__(config, facts)
        if facts.popularity is None:
            raise ConfigError(
                "unkd divides items by popularity, but this data set has classes and no items; give interactions of "
                "users with items as --data."
            )
        group = popularity_groups(facts.popularity, config.groups)
        self.head, self.sizes = facts.cuts, [n for n in group.bincount(minlength=config.groups).tolist() if n]
        # Known from the data, so that no checkpoint needs them.
        self.register_buffer("items", group.argsort(stable=True), persistent=False)

    @classmethod
    def teacher_outputs(cls, config: Any, cuts: int) -> set[int]:
        return {cuts}

    def forward(self, batch: StepBatch, student: dict[int, Tensor], network: Network) -> Tensor:
        assert batch.labels is not None, "the labels say which items are a user's"
        scores = student[self.head].float()
        ranked = batch.targets[self.head].float().masked_fill(batch.labels > 0, -torch.inf)
        losses = [self._within(items, scores, ranked) for items in self.items.split(self.sizes)]
        return self.config.weight * torch.stack(losses).mean()

    def _within(self, items: Tensor, scores: Tensor, ranked: Tensor) -> Tensor:
        """The loss of one group, int64 `[size]`; `ranked` `[N, items]` are the teacher's scores, -inf where an item is
        left out."""
        of_teacher = ranked[:, items]
        deepest = min(len(items), math.ceil(_REACH * self.config.depth))
        order = of_teacher.topk(deepest, dim=1).indices
        ranks = self._ranks(of_teacher.isfinite().sum(1).clamp(max=deepest)).sort(dim=2).values
        above, below = (scores.gather(1, items[order.gather(1, one)]) for one in ranks.unbind(2))
        counts = (ranks[..., 0] < ranks[..., 1]).to(scores.dtype)  # an item beside itself says nothing
        return (nn.functional.softplus(below - above) * counts).sum() / counts.sum().clamp(min=1)

    def _ranks(self, there: Tensor) -> Tensor:
        """Draw ranks from 0 to `there` - 1 `[N]` for pairs, int64 `[N, pairs, 2]`, from a geometric distribution."""
        pairs, depth, there = self.config.pairs // len(self.sizes), self.config.depth, there[:, None, None]
        chosen = torch.rand(len(there), pairs, 2, device=there.device)
        reached = -torch.expm1(-there / depth)
        ranks = (-depth * torch.log1p(-chosen * reached)).long()
        return torch.minimum(ranks, there - 1).clamp(min=0)


add_method("unkd", Method(logits="bpr", auxiliary="unkd"))
