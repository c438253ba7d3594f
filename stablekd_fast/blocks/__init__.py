"""Teacher and student cut into paired blocks, with bridges where widths differ."""

from stablekd_fast.blocks.bridge import Bridge, fit_bridge
from stablekd_fast.blocks.describe import blocks_text, describe_blocks
from stablekd_fast.blocks.fuse import fuse_norms, pick_fusion
from stablekd_fast.blocks.modes import evaluation_mode
from stablekd_fast.blocks.pair import Cut, PairedBlocks, pair_blocks
from stablekd_fast.blocks.reused import pair_reused
from stablekd_fast.blocks.serving import serve

__all__ = [
    "Bridge",
    "Cut",
    "PairedBlocks",
    "blocks_text",
    "describe_blocks",
    "evaluation_mode",
    "fit_bridge",
    "fuse_norms",
    "pair_blocks",
    "pair_reused",
    "pick_fusion",
    "serve",
]
