"""Groups of items that have about equally many interactions together."""

from __future__ import annotations

import torch
from torch import Tensor


def popularity_groups(popularity: Tensor, count: int) -> Tensor:
    """Return the group of each item, int64 `[items]`: 0 holds the most popular ones, `count` - 1 the least popular.

    `popularity` `[items]` is how many interactions each item has; of equally popular items the first come first. Each
    group takes items until its share of all interactions is reached, so that later groups hold more items. Where one
    item has more than a share, groups may be empty.
    """
    popularity = popularity.double()
    order = popularity.argsort(descending=True, stable=True)
    before = popularity[order].cumsum(0) - popularity[order]
    total = popularity.sum().clamp(min=1)
    group = (before * count / total).long().clamp(max=count - 1)
    return torch.empty_like(group).scatter(0, order, group)
