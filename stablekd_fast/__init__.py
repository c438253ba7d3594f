"""Blockwise knowledge distillation after StableKD (arXiv 2312.13223).

Public names: `pair_blocks`, `Blockwise`, `distill`, `Distiller`, `DistillConfig`, `open_dataset`, `evaluate_file`,
`black_box`, the operators in `stablekd_fast.kernels` and the losses in `stablekd_fast.losses`.
"""

# pyright: reportUnsupportedDunderAll=false

from __future__ import annotations

__version__ = "0.1.0"

_HOMES = {
    "Blockwise": "stablekd_fast.integrations.blockwise",
    "black_box": "stablekd_fast.models.black_box",
    "pair_blocks": "stablekd_fast.blocks",
    "distill": "stablekd_fast.run.distiller",
    "Distiller": "stablekd_fast.run.distiller",
    "DistillConfig": "stablekd_fast.config",
    "evaluate_file": "stablekd_fast.run.exported",
    "open_dataset": "stablekd_fast.data",
}
"""Where the public names are; checkers of types read `__init__.pyi` instead."""

__all__ = [
    "Blockwise",
    "DistillConfig",
    "Distiller",
    "__version__",
    "black_box",
    "distill",
    "evaluate_file",
    "open_dataset",
    "pair_blocks",
]


def __getattr__(name: str):
    """Import on first use, so that `import stablekd_fast` costs nothing and changes nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'stablekd_fast' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
