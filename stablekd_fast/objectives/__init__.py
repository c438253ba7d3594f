"""Losses by name, thin layers over `stablekd_fast.kernels`."""

from stablekd_fast.objectives import (  # noqa: F401  (importing registers them)
    at,
    cckd,
    ckd,
    crd,
    dist,
    dkd,
    dlb,
    fitnet,
    kd,
    kdiga,
    logit_std,
    mix_kd,
    mse,
    multi_teacher,
    none,
    r2kd,
    reviewkd,
)
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
