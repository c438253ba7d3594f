"""How well scores rank the items that are to be found: recall and normalised discounted cumulative gain."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stablekd_fast.data.users import SEEN, TO_BE_FOUND, UNPOPULAR

LENGTH = 20
"""Items that are recommended to a user."""
SUMS = 7
"""How many numbers `ranking_sums` gives."""


@dataclass(frozen=True)
class Ranking:
    """Means over users, 0 to 1, of lists of `LENGTH` items. `recall`: the share of the items to be found that are in
    the list; `ndcg`: how high they stand there. Those on unpopular items take only these as items to be found, in the
    same lists, and the users who have some."""

    recall: float
    ndcg: float
    recall_unpopular: float
    ndcg_unpopular: float


def ranking_sums(scores: Tensor, labels: Tensor) -> Tensor:
    """Add up over users: recall, NDCG, loss, the number of users; then recall, NDCG and users for unpopular items.

    `scores` float `[N, items]`, `labels` int8 `[N, items]` (see `stablekd_fast.data.users`). The result is float64
    `[SUMS]`. The loss of a user is the mean cross entropy of the items to be found among those not seen in training.
    """
    scores = scores.double().masked_fill(labels == SEEN, -torch.inf)
    order = scores.topk(min(LENGTH, scores.shape[1]), dim=1).indices
    sums = []
    for wanted in (labels >= TO_BE_FOUND, labels == UNPOPULAR):
        hits, count = wanted.gather(1, order).double(), wanted.sum(1)
        discount = 1 / torch.arange(2, hits.shape[1] + 2, device=hits.device, dtype=torch.float64).log2()
        best = torch.cat([discount.new_zeros(1), discount.cumsum(0)])[count.clamp(max=len(discount))]
        there = count > 0
        recall = torch.where(there, hits.sum(1) / count.clamp(min=1), 0.0)
        ndcg = torch.where(there, (hits * discount).sum(1) / best.clamp(min=1e-12), 0.0)
        sums += [recall.sum(), ndcg.sum(), there.sum().double()]
    wanted = labels >= TO_BE_FOUND
    losses = -(torch.log_softmax(scores, 1).masked_fill(~wanted, 0.0).sum(1) / wanted.sum(1).clamp(min=1))
    recall, ndcg, users, *unpopular = sums
    return torch.stack([recall, ndcg, losses.sum(), users, *unpopular])


def ranking_of(sums: list[float]) -> Ranking:
    """Make means of what `ranking_sums` added up."""
    recall, ndcg, _, users, recall_unpopular, ndcg_unpopular, some = sums
    some = max(some, 1.0)
    return Ranking(recall / users, ndcg / users, recall_unpopular / some, ndcg_unpopular / some)
