"""Attention transfer at cuts (Zagoruyko and Komodakis, ICLR 2017: arXiv 1612.03928)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from stablekd_fast import kernels
from stablekd_fast.errors import check_range
from stablekd_fast.objectives.methods import Method, add_method
from stablekd_fast.objectives.registry import register


@dataclass(frozen=True)
class AttentionTransfer:
    """`weight` times the mean squared difference of spatial attention maps: the mean of |x|^`power` over channels,
    scaled to unit length. The authors' weight, for this mean, is 1000."""

    weight: float = 1000.0
    """Weight of the loss at each cut."""
    power: float = 2.0
    """The power of an activation's magnitude."""

    def __post_init__(self) -> None:
        check_range(self, "weight", above=0)
        check_range(self, "power", least=1)


@register("feature", "at", AttentionTransfer, any_width=True)
def attention_transfer(
    config: AttentionTransfer, student: Tensor, target: Tensor, channel_axis: int, upstream: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return loss and gradient, both times `upstream`. Places are all dimensions but those of batch and channels; the
    channel counts may differ."""
    if student.dim() == 4 and channel_axis == 1:
        maps = student, target
    else:
        maps = tuple(x.movedim(channel_axis, 1).flatten(2).unsqueeze(3) for x in (student, target))
    loss, gradient = kernels.attention_transfer_with_grad(
        *maps, power=config.power, weight=config.weight, upstream=upstream
    )
    if maps[0] is student:
        return loss, gradient
    moved = student.movedim(channel_axis, 1)
    return loss, gradient.reshape(moved.shape).movedim(1, channel_axis)


add_method("at", Method(align="all", feature="at", options={"logits": {"kl_weight": 0.0}}))
