"""Losses by name, thin layers over `stablekd_fast.kernels`."""

from stablekd_fast.objectives import kd, mse  # noqa: F401  (importing registers them)
from stablekd_fast.objectives.objectives import Objectives
from stablekd_fast.objectives.registry import FeatureObjective, LogitObjective, objective, register

__all__ = ["FeatureObjective", "LogitObjective", "Objectives", "objective", "register"]
