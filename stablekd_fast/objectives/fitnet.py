"""Hints: a learned regressor brings the student's features to the teacher's width (Romero et al., FitNets:
arXiv 1412.6550)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from stablekd_fast import kernels
from stablekd_fast.errors import ConfigError, check_range
from stablekd_fast.objectives.auxiliary import Auxiliary, Facts, Network, StepBatch, wide
from stablekd_fast.objectives.methods import Method, add_method
from stablekd_fast.objectives.registry import register


@dataclass(frozen=True)
class FitNet:
    """`weight` times the mean squared error between the regressed features of the student and the teacher's, at one
    cut. The authors train hints first and the head later; here, as in most toolboxes, both train together."""

    weight: float = 100.0
    """Weight of the loss at the cut; toolboxes give it 100."""
    cut: int | None = None
    """The number of the cut, from 1; None takes the one in the middle."""

    def __post_init__(self) -> None:
        check_range(self, "weight", above=0)


@register("auxiliary", "fitnet", FitNet)
class Hint(Auxiliary):
    """The regressor is a product per place, without bias: a convolution of 1 x 1, or a linear layer on tokens."""

    any_width = True

    def __init__(self, config: FitNet, facts: Facts) -> None:
        super().__init__(config, facts)
        (self.cut,) = self.teacher_outputs(config, facts.cuts)
        self.regressor = nn.Linear(*facts.widths(self.cut), bias=False)

    @classmethod
    def teacher_outputs(cls, config: Any, cuts: int) -> set[int]:
        """The cut of the hint. Raises ConfigError where there is none."""
        cut = (cuts + 1) // 2 if config.cut is None else config.cut
        if not 1 <= cut <= cuts:
            raise ConfigError(f"fitnet.cut={cut} was given, but the networks have {cuts} cuts, counted from 1.")
        return {cut - 1}

    @classmethod
    def student_outputs(cls, config: Any, cuts: int) -> set[int]:
        return cls.teacher_outputs(config, cuts)

    def forward(self, batch: StepBatch, student: dict[int, Tensor], network: Network) -> Tensor:
        axis = self.facts.channel_axes[self.cut]
        hint = self.regressor(wide(student[self.cut]).movedim(axis, -1)).movedim(-1, axis)
        return self.config.weight * kernels.feature_mse(hint, batch.targets[self.cut], normalize=None)


add_method("fitnet", Method(auxiliary="fitnet"))
