"""How near the embedding of a student without a classifier comes to its teacher's. No label is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stablekd_fast.blocks import PairedBlocks
from stablekd_fast.data import Batch
from stablekd_fast.errors import DataError
from stablekd_fast.models.outputs import logits_of
from stablekd_fast.objectives import Objectives
from stablekd_fast.objectives.auxiliary import wide
from stablekd_fast.objectives.embedding import OfEmbedding, relations

Compared = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Gives for images what the student makes of them, and what it should be, `[N, ..., D]` both."""


@dataclass(frozen=True)
class Alignment:
    """Means over images."""

    cosine: float
    """The cosine of the student's embedding, mapped to the teacher's width, with the teacher's, -1 to 1."""
    relative_error: float
    """The length of the difference as a share of the length of the teacher's embedding."""
    images: int

    @property
    def finite(self) -> bool:
        """Whether all is a number."""
        return math.isfinite(self.cosine) and math.isfinite(self.relative_error)

    def event(self) -> dict[str, float]:
        """What is logged."""
        return {"cosine": self.cosine, "relative_error": self.relative_error}


def compared(paired: PairedBlocks, objectives: Objectives, student: nn.Module) -> Compared:
    """Return what compares a student with the teacher of a pair without a classifier.

    With `head="embedding"` the last outputs are compared as the loss does it: by its projector, or, where it is
    relational, by the cosines of each image with those of its batch. With `none` the student's output is compared with
    what its own last block, which has nothing to train, makes of the teacher's features at the last cut; where no
    bridge brings these to the student's width, by such cosines too.
    """
    head, module = len(paired.cuts), objectives.module
    if paired.head == "none":

        def of_features(images: Tensor) -> tuple[Tensor, Tensor]:
            features = paired.teacher_outputs(images, [head - 1])[head - 1]
            own, theirs = wide(logits_of(student(images))), wide(paired.student_blocks[head](features))
            return (
                (own, theirs)
                if own.shape == theirs.shape
                else (relations(own.flatten(1)), relations(theirs.flatten(1)))
            )

        return of_features
    assert isinstance(module, OfEmbedding), "the settings see to it"

    def of_embeddings(images: Tensor) -> tuple[Tensor, Tensor]:
        return module.compared(logits_of(student(images)), paired.teacher_outputs(images, [head])[head])

    return of_embeddings


@torch.no_grad()
def aligned(
    pair: Compared,
    batches: Iterable[Batch],
    to_device: Callable[[Tensor], Tensor],
    total: Callable[[Tensor], Tensor] = lambda own: own,
) -> Alignment:
    """Compare student and teacher on images (taken as they are; put both in eval mode first).

    `total` adds up sums over processes, each of which has other batches. Raises DataError where there is no image.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    for batch in batches:
        own, theirs = (x.float().flatten(1) for x in pair(to_device(batch.pixels)))
        cosines = nn.functional.cosine_similarity(own, theirs, dim=1)
        errors = (own - theirs).norm(dim=1) / theirs.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        found = torch.stack([cosines.double().sum(), errors.double().sum(), cosines.new_tensor(len(own)).double()])
        sums = sums.to(found.device) + found
    cosine, error, count = total(sums.cpu()).tolist()
    if not count:
        raise DataError("None of the images to evaluate on can be read.")
    return Alignment(cosine / count, error / count, int(count))
