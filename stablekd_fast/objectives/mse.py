"""Feature alignment by mean squared error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stablekd_fast import kernels
from stablekd_fast.objectives.registry import register


@dataclass(frozen=True)
class FeatureMSE:
    """`weight` times the mean squared error, divided by the target's mean power by default.

    Dividing by the power puts all blocks on one scale, whatever the size of their activations.
    """

    weight: float = 1.0
    """Weight of the loss at each cut."""
    normalize: Literal["power", "channel", "l2"] | None = "power"
    """What brings features to one scale: the target's mean power, a standardisation per channel, or unit length per
    sample; None leaves them as they are."""


def _power(config: FeatureMSE, target: Tensor) -> Tensor | None:
    """Return the target's mean square, where the loss is divided by it."""
    if config.normalize != "power":
        return None
    wide = torch.float64 if target.dtype == torch.float64 else torch.float32
    return torch.linalg.vector_norm(target, dtype=wide).square() / target.numel()


@register("feature", "mse", FeatureMSE, whole_batch=_power)
def feature_mse(
    config: FeatureMSE,
    student: Tensor,
    target: Tensor,
    channel_axis: int,
    power: Tensor | None = None,
    upstream: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return loss and gradient, both times `upstream`. `power` is the mean square of the whole batch's target; None: of
    this one."""
    return kernels.feature_mse_with_grad(
        student,
        target,
        normalize=config.normalize,
        scale=power,
        weight=config.weight,
        channel_axis=channel_axis,
        upstream=upstream,
    )
