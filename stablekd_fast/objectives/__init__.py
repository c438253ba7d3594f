"""Losses by name, thin layers over `stablekd_fast.kernels`."""

from stablekd_fast.objectives import bpr, dkd, fitnet, gkd, kd, mse, unkd  # noqa: F401  (importing registers them)
from stablekd_fast.objectives.auxiliary import Auxiliary, Facts, StepBatch
from stablekd_fast.objectives.methods import METHODS, Method, add_method, method_named
from stablekd_fast.objectives.objectives import Objectives
from stablekd_fast.objectives.registry import (
    AuxiliaryObjective,
    FeatureObjective,
    LogitObjective,
    differentiated,
    objective,
    register,
)

__all__ = [
    "METHODS",
    "Auxiliary",
    "AuxiliaryObjective",
    "Facts",
    "FeatureObjective",
    "LogitObjective",
    "Method",
    "Objectives",
    "StepBatch",
    "add_method",
    "differentiated",
    "method_named",
    "objective",
    "register",
]
