"""No loss at the head: for methods whose auxiliary loss is all there is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stablekd_fast.objectives.registry import register


@dataclass(frozen=True)
class Nothing:
    """Has no options."""


@register("logits", "none", Nothing)
def nothing(config: Nothing, student: Tensor, teacher: Tensor | None, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return 0 and a gradient of zeros."""
    return torch.zeros((), device=student.device), torch.zeros_like(student)
