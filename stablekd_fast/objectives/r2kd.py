"""Robustness-reinforced distillation: correlation in value and rank, from a teacher mixed with a pruned one (Kim et
al., R2KD, TKDE 2024: arXiv 2311.13934).

The value term is that of the authors' code: one minus the magnitude of the cosine between predictions, by sample and by
class. Their rank term takes ranks by sorting, which has no gradient; here ranks are soft, a sum of sigmoids of
differences, which come to the same ranks as `softness` goes to 0. Their terms on a second, augmented batch are left
out: give the run `--mix` or `--augment` instead.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from stablekd_fast.errors import ConfigError, check_range
from stablekd_fast.objectives.auxiliary import Auxiliary, Facts, Network, StepBatch, wide
from stablekd_fast.objectives.frozen import Frozen
from stablekd_fast.objectives.methods import Method, add_method
from stablekd_fast.objectives.registry import register


@dataclass(frozen=True)
class R2KD:
    """`value_weight` * T^2 * (cosine distances by sample and by class) + `rank_weight` * (1 - rank correlation)."""

    temperature: float = 4.0
    """What logits are divided by before they are compared."""
    value_weight: float = 2.0
    """Weight of the distance in value."""
    rank_weight: float = 2.0
    """Weight of the distance in rank."""
    pruned: float = 0.1
    """The fraction of each layer's weights that the second teacher has not, those of the smallest magnitude."""
    teacher_weight: float = 0.7
    """The whole teacher's part of the mean of both teachers' logits."""
    softness: float = 0.01
    """The difference of probabilities over which a rank changes."""

    def __post_init__(self) -> None:
        check_range(self, "temperature", "softness", above=0)
        check_range(self, "value_weight", "rank_weight", least=0)
        check_range(self, "pruned", "teacher_weight", least=0, most=1)


@register("auxiliary", "r2kd", R2KD)
class RobustnessReinforced(Auxiliary):
    """The pruned teacher runs in the step, on the images; its answers are not kept in a cache."""

    reads_images = True
    relates = True

    def __init__(self, config: R2KD, facts: Facts) -> None:
        super().__init__(config, facts)
        if not isinstance(facts.teacher, nn.Module):
            raise ConfigError("r2kd prunes the teacher's weights, but this teacher is a function; use a network.")
        self.pruned = Frozen(pruned(facts.teacher, config.pruned))

    @classmethod
    def teacher_outputs(cls, config: Any, cuts: int) -> set[int]:
        return {cuts}

    def forward(self, batch: StepBatch, student: dict[int, Tensor], network: Network) -> Tensor:
        config, head = self.config, self.facts.cuts
        assert batch.images is not None
        own = config.teacher_weight * wide(batch.targets[head])
        teacher = own + (1 - config.teacher_weight) * self.pruned(wide(batch.images))
        p, q = (torch.softmax(wide(logits) / config.temperature, 1) for logits in (teacher, student[head]))
        value = cosine_distance(q, p, 1) + cosine_distance(q, p, 0)
        rank = 1 - correlation(soft_ranks(q, config.softness), soft_ranks(p, config.softness)).mean()
        return config.value_weight * config.temperature**2 * value + config.rank_weight * rank


def pruned(network: nn.Module, amount: float) -> nn.Module:
    """Return a copy in which each convolution and linear layer lacks the `amount` (0 to 1) of its smallest weights."""
    copied = copy.deepcopy(network).to(memory_format=torch.contiguous_format)  # prune views weights as vectors
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    for module in copied.modules():
        if isinstance(module, kinds):
            prune.l1_unstructured(module, "weight", amount=amount)
            prune.remove(module, "weight")
    return copied


def cosine_distance(a: Tensor, b: Tensor, axis: int) -> Tensor:
    """Return the mean of 1 - |cosine| of the vectors of `[N, C]` along an axis."""
    lengths = a.norm(dim=axis) * b.norm(dim=axis) + 1e-8
    return 1 - ((a * b).sum(axis).abs() / lengths).mean()


def soft_ranks(values: Tensor, softness: float) -> Tensor:
    """Return for each value of a row `[N, C]` about how many of the others are smaller."""
    return torch.sigmoid((values[:, :, None] - values[:, None, :]) / softness).sum(2)


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Return Pearson's correlation of the rows of `[N, C]`, `[N]`."""
    a, b = (x - x.mean(1, keepdim=True) for x in (a, b))
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)


add_method("r2kd", Method(auxiliary="r2kd", options={"logits": {"kl_weight": 0.0}}))
