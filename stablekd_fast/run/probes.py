"""How much the features of a frozen backbone tell of the classes: probes that learn from features alone, in seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stablekd_fast.data import Batch
from stablekd_fast.errors import ConfigError, DataError, nearest
from stablekd_fast.models.outputs import logits_of

NEIGHBOURS, TEMPERATURE = 20, 0.07
"""How many neighbours vote, and by which their cosines are divided before they weight the votes (as DINO's authors have
it, arXiv 2104.14294)."""
_AT_A_TIME = 1024


def probes_named(names: str) -> list[str]:
    """The probes of a list with commas. Raises ConfigError for one that does not exist."""
    found = [name.strip() for name in names.split(",")]
    for name in found:
        if name not in PROBES:
            raise ConfigError(f"There is no probe {name!r}{nearest(name, PROBES)}; choose of {', '.join(PROBES)}.")
    return found


@torch.no_grad()
def features_of(
    network: nn.Module, batches: Iterable[Batch], to_device: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """What a network in eval mode gives for images, float32 `[N, D]`, tokens and maps as their mean over places, and
    their labels, int64 `[N]`; both in main memory.

    Raises DataError where there is no image, or none with one class.
    """
    features, labels = [], []
    for batch in batches:
        output = logits_of(network(to_device(batch.pixels))).float()
        if output.dim() > 2:
            output = output.flatten(2).mean(2) if output.dim() == 4 else output.mean(1)
        features.append(output.cpu())
        labels.append(batch.labels.cpu())
    if not features:
        raise DataError("None of the images to evaluate on can be read.")
    if labels[0].dim() != 1:
        raise DataError("A probe needs one class for each image, which these data have not.")
    return torch.cat(features), torch.cat(labels)


def nearest_neighbours(train: Tensor, labels: Tensor, test: Tensor) -> Tensor:
    """The classes, int64 `[M]`, that the `NEIGHBOURS` nearest of `train` `[N, D]` by cosine vote for, for features
    `test` `[M, D]`. A vote counts exp(cosine / `TEMPERATURE`)."""
    train, found = F.normalize(train, dim=1), []
    classes = int(labels.max()) + 1
    for part in F.normalize(test, dim=1).split(_AT_A_TIME):
        cosines, places = (part @ train.T).topk(min(NEIGHBOURS, len(train)), dim=1)
        votes = torch.zeros(len(part), classes).scatter_add_(1, labels[places], (cosines / TEMPERATURE).exp())
        found.append(votes.argmax(1))
    return torch.cat(found)


def linear(train: Tensor, labels: Tensor, test: Tensor) -> Tensor:
    """The classes, int64 `[M]`, by a logistic regression on features that are standardised by `train`.

    Raises DataError where the training images have one class only.
    """
    from sklearn.linear_model import LogisticRegression  # slow to import, and only this needs it

    if len(labels.unique()) < 2:
        raise DataError("A linear probe needs images of at least two classes to learn from.")
    mean, spread = train.mean(0), train.std(0).clamp_min(1e-6)
    fitted = LogisticRegression(max_iter=1000).fit(((train - mean) / spread).numpy(), labels.numpy())
    return torch.from_numpy(fitted.predict(((test - mean) / spread).numpy()))


PROBES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"knn": nearest_neighbours, "linear": linear}


def probed(names: Sequence[str], train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> list[dict]:
    """A row for each probe: its accuracy on features and labels `test` after those of `train`, and its seconds."""
    rows = []
    for name in names:
        begun = time.perf_counter()
        right = PROBES[name](*train, test[0]) == test[1]
        rows.append(
            {
                "probe": name,
                "accuracy": right.double().mean().item(),
                "features": train[0].shape[1],
                "learnt_from": len(train[0]),
                "images": len(test[0]),
                "seconds": time.perf_counter() - begun,
            }
        )
    return rows
