"""Networks without their classifier, which give an embedding: a vector `[N, D]`, tokens or a map."""

from __future__ import annotations

import os

from torch import nn

from stablekd_fast.errors import ModelError
from stablekd_fast.models.published import published
from stablekd_fast.models.registry import build
from stablekd_fast.models.weights import load_weights


def without_classifier(network: nn.Module) -> list[str]:
    """Take the classifier off a network, in place: it then gives what its classifier read. Returns the names of the
    weights that are gone.

    A network of timm does it by itself; of others the module that holds the last weights is the classifier.
    Raises ModelError where that is no product.
    """
    before = list(network.state_dict())
    reset = getattr(network, "reset_classifier", None)
    if callable(reset):
        reset(0)
    else:
        path = before[-1].rpartition(".")[0] if before else ""
        last = network.get_submodule(path)
        if not path or not isinstance(last, (nn.Linear, nn.Conv2d)):
            raise ModelError(
                f"{type(network).__name__} ends in {path or 'no module'} ({type(last).__name__}), which is no "
                "classifier that could be taken off. Give the network itself, without one, as a module."
            )
        place, _, name = path.rpartition(".")
        setattr(network.get_submodule(place), name, nn.Identity())
    left = network.state_dict().keys()
    return [name for name in before if name not in left]


def named_network(
    name: str,
    classes: int,
    image_size: int | None,
    head: str,
    weights: str | os.PathLike | None = None,
    *,
    fetches: bool = True,
) -> nn.Module:
    """Make a network by its name, as `build` does, and load its weights, where a file is given: with a classifier for
    so many classes, or, where `head` is another, without one; the file may then hold one all the same. Published
    weights that the name asks for are fetched unless there is a file, or `fetches` is false.

    Raises ModelError for a name that is not known, for a file that does not fit, and for models of users and items
    without a classifier, which have no other output.
    """
    taken_off: list[str] = []
    fetches = fetches and weights is None
    found = published(name) if fetches else None
    if head == "classifier":
        network = build(name, classes, image_size, weights=fetches)
    elif name.startswith("mf/"):
        raise ModelError(f"{name} gives scores of items and has no classifier to take off; use head=classifier.")
    elif found is not None:
        network = found.build(found.classes, image_size)
        taken_off = without_classifier(network) if found.classes else []
    else:
        network = build(name, 1000, image_size, weights=False)
        taken_off = without_classifier(network)
    if weights:
        load_weights(network, weights, taken_off)
    return network
