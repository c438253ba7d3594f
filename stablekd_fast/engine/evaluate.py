"""Accuracy of the composed student, and the measures taken around a merge. None of it changes training."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stablekd_fast.data import Batch
from stablekd_fast.engine.ranking import SUMS, Ranking, ranking_of, ranking_sums
from stablekd_fast.errors import DataError
from stablekd_fast.models.outputs import logits_of


@dataclass(frozen=True)
class Metrics:
    """What a network reaches on a split. Where users are ranked items for, recall stands for `accuracy` and NDCG for
    `top5`."""

    accuracy: float
    """Top-1, 0 to 1."""
    top5: float
    loss: float
    """Mean cross entropy."""
    images: int
    """How many there are, or users."""
    ranking: Ranking | None = None
    """How well items are ranked, of users."""

    @property
    def finite(self) -> bool:
        """Whether the loss is a number."""
        return math.isfinite(self.loss)

    def event(self) -> dict[str, Any]:
        """What is logged."""
        found = {"accuracy": self.accuracy, "top5": self.top5, "loss": self.loss}
        return found if self.ranking is None else found | {"ranking": asdict(self.ranking)}


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds an infinity or no number; None if there is none."""
    return next((n for n, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()), None)


@torch.no_grad()
def with_fresh_batch_norm(
    model: nn.Module, batches: Iterable[Batch], to_device: Callable[[Tensor], Tensor]
) -> nn.Module:
    """A copy of `model` in eval mode whose batch-norm statistics are averages over `batches`; without any, its own.

    Blocks trained on the teacher's activations hold statistics of those; composed, the student sees its own.
    """
    model = copy.deepcopy(model).eval()
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    norms, batches = [norm for norm in norms if norm.track_running_stats], iter(batches)
    first = next(batches, None)
    if not norms or first is None:
        return model
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
        norm.train()
    for batch in itertools.chain([first], batches):
        model(to_device(batch.pixels))
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
        norm.eval()
    return model


@torch.no_grad()
def evaluate(
    model: Callable[[Tensor], Any],
    batches: Iterable[Batch],
    to_device: Callable[[Tensor], Tensor],
    total: Callable[[Tensor], Tensor] = lambda own: own,
) -> Metrics:
    """Top-1, top-5 and cross entropy of `model` (taken as it is; put it in eval mode first).

    `total` adds up sums over processes, each of which has other batches.
    """
    sums = torch.zeros(SUMS, dtype=torch.float64)
    ranks_items = False
    for batch in batches:
        images, labels = to_device(batch.pixels), to_device(batch.labels)
        logits, ranks_items = logits_of(model(images)).float(), labels.dim() == 2
        own = ranking_sums(logits, labels) if ranks_items else _right_ones(logits, labels)
        sums = sums.to(own.device) + own  # the host reads them once, at the end
    found = total(sums.cpu()).tolist()
    correct, correct5, loss, count = found[:4]
    if not count:
        raise DataError("None of the images to evaluate on can be read.")
    ranking = ranking_of(found) if ranks_items else None
    return Metrics(correct / count, correct5 / count, loss / count, int(count), ranking)


def _right_ones(logits: Tensor, labels: Tensor) -> Tensor:
    """Add up over images: right at once, right among five, cross entropy, the number of images; then zeros, where
    `ranking_sums` has more. The result is float64 `[SUMS]`."""
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
    own = torch.stack([ranked[:, 0].sum(), ranked.any(1).sum(), loss]).double()
    return torch.cat([own, own.new_full((1,), len(labels)), own.new_zeros(SUMS - 4)])
