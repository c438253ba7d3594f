"""Several processes as one run: who they are, which blocks and images each trains, and what they tell each other."""

from stablekd_fast.distributed.layout import Averaging, Layout
from stablekd_fast.distributed.norms import sync_norms
from stablekd_fast.distributed.ranks import Ranks, join

__all__ = ["Averaging", "Layout", "Ranks", "join", "sync_norms"]
