"""Losses of the embedding that networks without a classifier give: of each sample, or of the relations of a batch.

`embedding`: the squared error as a share of the teacher's power, or one minus the cosine. `relational`: the mean square
of the difference between the student's and the teacher's cosine, over all pairs of different samples (after Tung and
Mori, Similarity-Preserving Knowledge Distillation, arXiv 1907.09682, who normalise by rows instead).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stablekd_fast.errors import ConfigError, check_range
from stablekd_fast.objectives.auxiliary import Auxiliary, Facts, Network, StepBatch, wide
from stablekd_fast.objectives.registry import register


@dataclass(frozen=True)
class Embedding:
    """`weight` times the mean over samples of |s - t|^2 / |t|^2 (`mse`), or over places of 1 - cosine (`cosine`)."""

    loss: Literal["mse", "cosine"] = "mse"
    """The squared error as a share of the teacher's power, of each sample; or one minus the cosine."""
    weight: float = 1.0
    """Weight of the loss."""
    projector: Literal["auto", "linear"] = "auto"
    """The learned map from the student's width to the teacher's, left out of the export: where widths differ, or
    always."""

    def __post_init__(self) -> None:
        check_range(self, "weight", above=0)
        for name, known in (("loss", ("mse", "cosine")), ("projector", ("auto", "linear"))):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name}={getattr(self, name)!r} was given; choose one of {', '.join(known)}.")


@dataclass(frozen=True)
class Relational:
    """`weight` times the mean over pairs of different samples of (cosine of s - cosine of t)^2."""

    weight: float = 1.0
    """Weight of the loss."""

    def __post_init__(self) -> None:
        check_range(self, "weight", above=0)


class OfEmbedding(Auxiliary):
    """A loss of the last output of both networks: vectors `[N, D]`, tokens `[N, T, D]` or maps `[N, C, H, W]`."""

    any_width = True
    reads_head = "embedding"
    ends_networks = True

    def __init__(self, config: Any, facts: Facts) -> None:
        super().__init__(config, facts)
        self.axes = [channel_axis_of(shapes[-1]) for shapes in (facts.student_shapes, facts.teacher_shapes)]
        own, theirs = facts.student_shapes[-1], facts.teacher_shapes[-1]
        self.widths = own[_place(own)], theirs[_place(theirs)]
        self.places = facts.places

    @classmethod
    def teacher_outputs(cls, config: Any, cuts: int) -> set[int]:
        return {cuts}

    def compared(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is to be alike, `[N, places, D]` of both, of both networks' last outputs; a vector is one
        place."""
        own, theirs = (_channels_last(wide(x), axis) for x, axis in zip((student, teacher), self.axes))
        if self.places is not None:
            theirs = self.places(theirs)
        return own.flatten(1, -2), theirs.flatten(1, -2)


@register("auxiliary", "embedding", Embedding)
class EmbeddingLoss(OfEmbedding):
    """The projector is a linear map with bias, for each place the same."""

    def __init__(self, config: Embedding, facts: Facts) -> None:
        super().__init__(config, facts)
        differ = self.widths[0] != self.widths[1]
        self.projector = nn.Linear(*self.widths) if differ or config.projector == "linear" else nn.Identity()

    def compared(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        own, theirs = super().compared(student, teacher)
        return self.projector(own), theirs

    def forward(self, batch: StepBatch, student: dict[int, Tensor], network: Network) -> Tensor:
        head = self.facts.cuts
        own, theirs = self.compared(student[head], batch.targets[head])
        if self.config.loss == "cosine":
            return self.config.weight * (1 - F.cosine_similarity(own, theirs, dim=-1)).mean()
        power = theirs.square().sum((1, 2)).clamp_min(torch.finfo(theirs.dtype).tiny)
        return self.config.weight * ((own - theirs).square().sum((1, 2)) / power).mean()


@register("auxiliary", "relational", Relational)
class RelationalLoss(OfEmbedding):
    """It compares samples, so widths may differ without a projector; all places of a sample are one vector."""

    relates = True

    def compared(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cosines of each sample with all of the batch, `[N, 1, N]` of both networks."""
        own, theirs = (relations(x.flatten(1)) for x in super().compared(student, teacher))
        return own[:, None], theirs[:, None]

    def forward(self, batch: StepBatch, student: dict[int, Tensor], network: Network) -> Tensor:
        head = self.facts.cuts
        own, theirs = self.compared(student[head], batch.targets[head])
        count = len(own)  # the diagonals are ones in both
        return self.config.weight * (own - theirs).square().sum() / max(count * (count - 1), 1)


def relations(x: Tensor) -> Tensor:
    """The cosine of each sample of `[N, D]` with each, `[N, N]`."""
    unit = F.normalize(x, dim=1)
    return unit @ unit.T


def channel_axis_of(shape: tuple[int, ...]) -> int:
    """In which dimension of a batch the channels of an embedding of this shape per image lie: they come first in a map,
    and last otherwise."""
    return 1 if len(shape) == 3 else -1


def _place(shape: tuple[int, ...]) -> int:
    return channel_axis_of(shape) - 1 if channel_axis_of(shape) > 0 else -1


def _channels_last(x: Tensor, axis: int) -> Tensor:
    """Bring an output to `[N, *places, D]`; a vector gets one place."""
    return x[:, None] if x.dim() == 2 else x.movedim(axis, -1)
