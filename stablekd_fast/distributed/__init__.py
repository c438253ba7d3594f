"""Several processes as one run: who they are, which blocks and images each trains, and what they tell each other."""

from stablekd_fast.distributed.layout import (
    Averaging,
    GroupCost,
    Layout,
    ReduceCost,
    assign,
    best_layout,
    linear,
    loads_of,
)
from stablekd_fast.distributed.norms import sync_norms
from stablekd_fast.distributed.ranks import Ranks, join

__all__ = [
    "Averaging",
    "GroupCost",
    "Layout",
    "Ranks",
    "ReduceCost",
    "assign",
    "best_layout",
    "join",
    "linear",
    "loads_of",
    "sync_norms",
]
