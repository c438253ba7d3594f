"""Losses by name, thin layers over `stablekd_fast.kernels`."""

from stablekd_fast.objectives import (  # noqa: F401  (importing registers them)
    at,
    bpr,
    cckd,
    ckd,
    crd,
    dist,
    dkd,
    dlb,
    embedding,
    fast_dfkd,
    fitnet,
    gkd,
    kd,
    kdiga,
    logit_std,
    mekd,
    mix_kd,
    mse,
    multi_teacher,
    none,
    r2kd,
    reviewkd,
    simkd,
    unkd,
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
from stablekd_fast.objectives.synthesis import Synthesis, SynthesisFacts, SynthesisObjective

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
    "Synthesis",
    "SynthesisFacts",
    "SynthesisObjective",
    "add_method",
    "differentiated",
    "method_named",
    "objective",
    "register",
]
