"""Knowledge review: each cut's features of the student are fused with those behind it before they are compared (Chen et
al., ReviewKD, CVPR 2021: arXiv 2104.09044).

Features of cuts are fused from the last to the first by attention, and compared by squared errors at several sizes. The
authors also review the pooled embedding as a further level, which is left out here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stablekd_fast.errors import ConfigError, check_range
from stablekd_fast.objectives.auxiliary import Auxiliary, Facts, Network, StepBatch, mean_pooling, wide
from stablekd_fast.objectives.methods import Method, add_method
from stablekd_fast.objectives.registry import register

_SIZES = (4, 2, 1)


@dataclass(frozen=True)
class ReviewKD:
    """`weight` * the sum over cuts of the distances of fused features to the teacher's."""

    weight: float = 1.0
    """Weight of the loss."""
    middle: int = 512
    """The most channels that fused features have."""

    def __post_init__(self) -> None:
        check_range(self, "weight", above=0)
        check_range(self, "middle", least=1)


@register("auxiliary", "reviewkd", ReviewKD)
class Review(Auxiliary):
    """It learns a fusion for each cut, left out of the export. Its batch norms take statistics of the batch at hand."""

    relates = True
    any_width = True

    def __init__(self, config: ReviewKD, facts: Facts) -> None:
        super().__init__(config, facts)
        shapes = list(zip(facts.student_shapes[:-1], facts.teacher_shapes[:-1]))
        if not shapes or any(len(shape) != 3 for pair in shapes for shape in pair):
            raise ConfigError("reviewkd fuses feature maps [C, H, W] at cuts, which these networks do not have.")
        middle = min(config.middle, max(student[0] for student, _ in shapes))
        last = len(shapes) - 1
        self.fusions = nn.ModuleList(
            Fusion(student[0], middle, teacher[0], fuses=k < last) for k, (student, teacher) in enumerate(shapes)
        )

    @classmethod
    def teacher_outputs(cls, config: Any, cuts: int) -> set[int]:
        return set(range(cuts))

    @classmethod
    def student_outputs(cls, config: Any, cuts: int) -> set[int]:
        return set(range(cuts))

    def forward(self, batch: StepBatch, student: dict[int, Tensor], network: Network) -> Tensor:
        loss, behind = torch.zeros((), device=batch.entry.device), None
        for k in reversed(range(len(self.fusions))):
            behind, out = self.fusions[k](wide(student[k]), behind)
            loss = loss + pyramid_distance(out, wide(batch.targets[k]))
        return self.config.weight * loss


class Fusion(nn.Module):
    """Joins features `[N, C, H, W]` with those behind them, weighed by an attention over both at each place."""

    def __init__(self, own: int, middle: int, out: int, *, fuses: bool) -> None:
        super().__init__()
        self.narrow = nn.Sequential(nn.Conv2d(own, middle, 1, bias=False), nn.BatchNorm2d(middle))
        self.attention = nn.Sequential(nn.Conv2d(2 * middle, 2, 1), nn.Sigmoid()) if fuses else None
        self.widen = nn.Sequential(nn.Conv2d(middle, out, 3, padding=1, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor, behind: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the fused features, and what is compared with the teacher's."""
        x = self.narrow(x)
        if self.attention is not None and behind is not None:
            behind = F.interpolate(behind, x.shape[-2:], mode="nearest")
            weights = self.attention(torch.cat([x, behind], 1))
            x = x * weights[:, :1] + behind * weights[:, 1:]
        return x, self.widen(x)


def pyramid_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared error of feature maps `[N, C, H, W]`, averaged with those of the maps pooled to 4, 2 and
    1 places a side, which count half, a quarter, an eighth."""
    loss, total, weight = F.mse_loss(student, teacher), 1.0, 1.0
    for size in _SIZES:
        if size >= student.shape[2]:
            continue
        weight /= 2
        pool = mean_pooling(student.shape[2:], (size, size))
        loss = loss + weight * F.mse_loss(pool(student), pool(teacher))
        total += weight
    return loss / total


add_method("reviewkd", Method(auxiliary="reviewkd", options={"logits": {"kl_weight": 0.0}}))
