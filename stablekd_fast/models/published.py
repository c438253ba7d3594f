"""Networks with published weights, asked for by name and fetched by the libraries that own them.

`torchvision/NAME@WEIGHTS`, `timm/NAME@WEIGHTS` and `hf:OWNER/NAME`, or `hf:FOLDER`: nothing else is ever fetched. A
repository of the Hugging Face hub says itself whether timm or transformers made it.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stablekd_fast.errors import ModelError, first_line
from stablekd_fast.models import hub
from stablekd_fast.models.timm_models import load_timm, timm_weights
from stablekd_fast.models.torchvision_models import build_torchvision, torchvision_weights
from stablekd_fast.models.weights import load_weights

HUB = "hf:"


@dataclass(frozen=True)
class Published:
    """A network whose weights are asked for by name. Making one fetches no weights."""

    name: str
    classes: int
    """How many it tells apart; 0 where it has no classifier."""
    make: Callable[[int, int | None], nn.Module]
    """Fetches the weights and makes the network, for a number of classes and a size of images or None. Where the number
    is not its own, the classifier has random weights. Raises ModelError."""
    card: dict[str, Any] = field(default_factory=dict)
    """What an exported student says of itself too, as far as it is known: `classes`, `mean`, `std`, `image_size`."""

    def build(self, classes: int, image_size: int | None) -> nn.Module:
        """Return the network with its weights; a classifier that is not its own is told by a warning."""
        if classes != self.classes:
            own = f"tells {self.classes} classes apart" if self.classes else "has no classifier"
            warnings.warn(f"{self.name} {own}: that for {classes} classes starts from random weights.", stacklevel=3)
        return self.make(classes, image_size)


def asks_for_weights(name: str) -> bool:
    """Whether a model's name stands for published weights too."""
    return "@" in name or name.startswith(HUB)


def without_weights(name: str) -> str:
    """Return the name of the network alone, where it has one: a repository of the hub is both."""
    return name if name.startswith(HUB) else name.partition("@")[0]


def published(name: str) -> Published | None:
    """Return what a name stands for; None where it asks for no weights. Raises ModelError for weights that do not
    exist or, of the hub, whose description cannot be read."""
    if name.startswith(HUB):
        return _of_hub(name)
    network, at, tag = name.partition("@")
    if not at:
        return None
    if network.startswith("timm/"):
        return _of_timm(name, network.removeprefix("timm/"), tag)
    if network.startswith("torchvision/"):
        return _of_torchvision(name, network.removeprefix("torchvision/"), tag)
    raise ModelError(
        f"{name!r} asks for published weights, which only torchvision/NAME@WEIGHTS, timm/NAME@WEIGHTS and hf:OWNER/NAME"
        " have; give the weights of other networks as a file."
    )


def _of_torchvision(name: str, network: str, tag: str) -> Published:
    member = torchvision_weights(network, tag)
    transforms: Any = member.transforms()
    names, folder = list(member.meta["categories"]), Path(torch.hub.get_dir()) / "checkpoints"
    remedy = (
        f"Put {member.url} into {folder}, or give the file by --teacher-weights, with --teacher torchvision/{network}."
    )

    def make(classes: int, image_size: int | None) -> nn.Module:
        with fetched(name, remedy):
            member.get_state_dict(progress=False, check_hash=True, weights_only=True)
        model = build_torchvision(network, len(names), image_size)
        load_weights(model, folder / member.url.rpartition("/")[2])
        if hasattr(model, "transform_input"):  # GoogLeNet and Inception want other images than the transforms make
            model.transform_input = True  # type: ignore[assignment]
        return model if classes == len(names) else _with_head_of(build_torchvision(network, classes, image_size), model)

    card = {"classes": names, "mean": list(transforms.mean), "std": list(transforms.std)}
    return Published(name, len(names), make, {**card, "image_size": int(transforms.crop_size[0])})


def _with_head_of(other: nn.Module, model: nn.Module) -> nn.Module:
    """Return `other`, the network for another number of classes, with all weights of `model` but the classifier's."""
    own, targets = model.state_dict(), other.state_dict()
    other.load_state_dict({key: own[key] if own[key].shape == value.shape else value for key, value in targets.items()})
    return other


def _of_timm(name: str, network: str, tag: str) -> Published:
    full, config = timm_weights(network, tag)
    place = config.hf_hub_id
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    remedy = hub.remedy(place) if place else f"Put {config.url} into {folder}."

    def make(classes: int, image_size: int | None) -> nn.Module:
        with fetched(name, remedy):
            return load_timm(full, classes, image_size if config.fixed_input_size else None)

    return Published(name, int(config.num_classes), make, hub.timm_card(config.to_dict()))


def _of_hub(name: str) -> Published:
    """What a repository's config.json describes: timm's have an `architecture`, transformers' `architectures`."""
    place, revision = hub.place_of(name.removeprefix(HUB))
    remedy = hub.remedy(place)
    with fetched(name, remedy):
        config = hub.config_of(place, revision)
        by_timm = "architecture" in config
        found = hub.timm_facts(config) if by_timm else hub.transformers_facts(place, revision, config)

    def make(classes: int, image_size: int | None) -> nn.Module:
        with fetched(name, remedy):
            if by_timm:
                tied = config.get("pretrained_cfg", config).get("fixed_input_size")
                return load_timm(hub.timm_source(place, revision), classes, image_size if tied else None)
            return hub.load_transformers(place, revision, classes, found.classes)

    return Published(name, found.classes, make, found.card)


@contextlib.contextmanager
def fetched(name: str, remedy: str) -> Iterator[None]:
    """A context in which a library fetches something: whatever it stumbles over is one sentence, and what to do."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # three libraries, each with errors of its own for a missing network
        raise ModelError(f"{name} cannot be loaded: {first_line(error)[:300].rstrip('.')}. {remedy}") from error
