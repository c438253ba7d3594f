"""Feature alignment by mean squared error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from stablekd_fast import kernels
from stablekd_fast.objectives.registry import register


@dataclass(frozen=True)
class FeatureMSE:
    """`weight` times the mean squared error, divided by the target's mean power by default.

    Dividing by the power puts all blocks on one scale, whatever the size of their activations.
    """

    weight: float = 1.0
    normalize: Literal["power", "channel", "l2"] | None = "power"


@register("feature", "mse", FeatureMSE)
def feature_mse(config: FeatureMSE, student: Tensor, target: Tensor, channel_axis: int) -> tuple[Tensor, Tensor]:
    return kernels.feature_mse_with_grad(
        student, target, normalize=config.normalize, weight=config.weight, channel_axis=channel_axis
    )
