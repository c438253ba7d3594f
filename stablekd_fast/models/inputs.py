"""How a network wants its images, and what turns the data set's images into that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Channels = tuple[float, float, float]


@dataclass(frozen=True)
class Normalisation:
    """By channel, for images scaled to 0..1."""

    mean: Channels
    std: Channels
    source: str
    """Who says so."""


def normalisation_of(model: nn.Module, card: Mapping[str, Any], weights: str | Path | None) -> Normalisation | None:
    """How a network's images are normalised: as the card of its weights says, else as timm's `pretrained_cfg` does.

    None where nobody says, and for exports of ours that had no such entry yet.
    """
    if "mean" in card and "std" in card:
        return Normalisation(_channels(card["mean"]), _channels(card["std"]), str(weights))
    if card:
        return None
    config = getattr(model, "pretrained_cfg", None)
    mean, std = (_field(config, name) for name in ("mean", "std"))
    if mean is not None and std is not None and len(mean) == len(std) == 3:
        return Normalisation(_channels(mean), _channels(std), "its pretrained_cfg")
    return None


def _field(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _channels(values: Any) -> Channels:
    first, second, third = map(float, values)
    return first, second, third


class Renormalised(nn.Module):
    """Turns images `[N, 3, H, W]` that were normalised one way into the same images normalised another way."""

    scale: Tensor
    shift: Tensor

    def __init__(self, given: Normalisation, wanted: Normalisation) -> None:
        super().__init__()
        mean, std, own_mean, own_std = (
            torch.tensor(values, dtype=torch.float64).reshape(3, 1, 1)
            for values in (given.mean, given.std, wanted.mean, wanted.std)
        )
        self.register_buffer("scale", (std / own_std).float())
        self.register_buffer("shift", ((mean - own_mean) / own_std).float())

    def forward(self, images: Tensor) -> Tensor:
        """Return the images in the type that they come in."""
        return torch.addcmul(self.shift, images.float(), self.scale).to(images.dtype)
