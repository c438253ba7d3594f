"""Several teachers: the divergence from the mean of their predictions (You et al., KDD 2017, and many since)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stablekd_fast import kernels, models
from stablekd_fast.errors import ConfigError, check_range
from stablekd_fast.models.outputs import LogitsOf
from stablekd_fast.objectives.auxiliary import Auxiliary, Facts, Network, StepBatch, wide
from stablekd_fast.objectives.frozen import Frozen
from stablekd_fast.objectives.methods import Method, add_method
from stablekd_fast.objectives.registry import register


@dataclass(frozen=True)
class MultiTeacher:
    """`weight` * T^2 * KL(mean of all teachers' predictions at temperature T || the student's)."""

    teachers: list[str] = field(default_factory=list)
    """The teachers beside the run's own, each as NAME:WEIGHTS, a model's name and a file of its weights. They take the
    student's images."""
    weight: float = 0.1
    """Weight of the divergence."""
    temperature: float = 4.0
    """What logits are divided by before they are compared."""

    def __post_init__(self) -> None:
        check_range(self, "weight", "temperature", above=0)
        if not self.teachers or not all(":" in name for name in self.teachers):
            raise ConfigError(
                f"teachers={self.teachers} was given; name at least one more teacher, as NAME:WEIGHTS, for example "
                "--auxiliary_options.teachers '[resnet110:resnet110.safetensors]'."
            )


@register("auxiliary", "multi-teacher", MultiTeacher)
class FurtherTeachers(Auxiliary):
    """The further teachers run in the step; the run's own one may be cached."""

    reads_images = True

    def __init__(self, config: MultiTeacher, facts: Facts) -> None:
        super().__init__(config, facts)
        self.teachers = nn.ModuleList(Frozen(_loaded(entry, facts)) for entry in config.teachers)

    @classmethod
    def teacher_outputs(cls, config: Any, cuts: int) -> set[int]:
        return {cuts}

    def forward(self, batch: StepBatch, student: dict[int, Tensor], network: Network) -> Tensor:
        config, head = self.config, self.facts.cuts
        assert batch.images is not None
        images = wide(batch.images)
        answers = [wide(batch.targets[head]), *(teacher(images) for teacher in self.teachers)]
        mean = torch.stack([torch.softmax(logits / config.temperature, 1) for logits in answers]).mean(0)
        logits = config.temperature * mean.clamp_min(1e-30).log()
        return config.weight * kernels.kd_loss(wide(student[head]), logits, temperature=config.temperature)


def _loaded(entry: str, facts: Facts) -> nn.Module:
    name, _, weights = entry.partition(":")
    teacher = models.build(name, facts.classes, facts.size[0])
    models.load_weights(teacher, weights)
    return LogitsOf(teacher)


add_method("multi-teacher", Method(auxiliary="multi-teacher", options={"logits": {"kl_weight": 0.0}}))
