"""Losses by name, thin layers over `stablekd_fast.kernels`."""

from stablekd_fast.objectives import kd, mse  # noqa: F401  (importing registers them)
from stablekd_fast.objectives.objectives import Objectives
from stablekd_fast.objectives.registry import objective, register

__all__ = ["Objectives", "objective", "register"]
