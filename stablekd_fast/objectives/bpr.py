"""Pairwise ranking of a user's items above others (Rendle et al., BPR, UAI 2009: arXiv 1205.2618)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stablekd_fast.errors import ConfigError, check_range
from stablekd_fast.objectives.methods import Method, add_method
from stablekd_fast.objectives.registry import differentiated, register


@dataclass(frozen=True)
class BPR:
    """`weight` times the mean of -log sigmoid(score of an item of the user - score of another item), over pairs that
    are drawn anew in each step, `pairs` for each user. The teacher is not read."""

    pairs: int = 32
    """Pairs that are drawn for each user."""
    weight: float = 1.0
    """Weight of the loss."""

    def __post_init__(self) -> None:
        check_range(self, "pairs", least=1)
        check_range(self, "weight", above=0)


def drawn(mass: Tensor, count: int) -> Tensor:
    """Draw `count` columns of each row of `mass` `[N, C]`, not negative, in proportion to it; int64 `[N, count]`.

    A row without mass gives any column. The host reads nothing.
    """
    upper = mass.float().cumsum(1)
    chosen = torch.rand(len(mass), count, device=mass.device) * upper[:, -1:]
    return torch.searchsorted(upper, chosen, right=True).clamp(max=mass.shape[1] - 1)


def _bpr(config: BPR, student: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor:
    """The loss of scores `[N, items]`; labels `[N, items]` are 1 for a user's items and 0 for others."""
    if labels.dim() != 2:
        raise ConfigError("bpr ranks the items of users, but the data set has classes; give interactions as --data.")
    own, other = (student.gather(1, drawn(mass, config.pairs)) for mass in (labels, 1 - labels))
    losses = nn.functional.softplus(other - own).mean(1)
    counts = (labels.amax(1) > 0).to(losses.dtype)  # a user without items has no pair
    return config.weight * (losses * counts).sum() / counts.sum().clamp(min=1)


bpr = register("logits", "bpr", BPR)(differentiated(_bpr))

add_method("bpr", Method(logits="bpr", needs_teacher=False))
