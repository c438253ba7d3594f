"""How a network wants its images, and what turns the data set's images into that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torchvision import models as torchvision_models

Channels = tuple[float, float, float]


@dataclass(frozen=True)
class ImageInput:
    """How a network's images are made: normalised by channel, for images scaled to 0..1, and of one size."""

    mean: Channels
    std: Channels
    source: str
    """Who says so."""
    size: int | None = None
    """Pixels of a side; None where any size will do."""


def input_of(model: nn.Module, card: Mapping[str, Any], weights: str | Path | None) -> ImageInput | None:
    """How a network's images are made, by the first of these that says it; None where nobody does.

    The card of its weights (an export of ours without these entries says nothing); the published file of that name
    among torchvision's weights; timm's `pretrained_cfg`; the image processor that lies beside a Hugging Face model, on
    this machine.
    """
    size = _tied_size(model)
    if "mean" in card and "std" in card:
        return ImageInput(_channels(card["mean"]), _channels(card["std"]), str(weights), size or card.get("image_size"))
    if card:
        return None
    published = _torchvision_weights(weights)
    if published is not None:
        transforms: Any = published.transforms()
        return ImageInput(_channels(transforms.mean), _channels(transforms.std), f"torchvision's {published}", size)
    config = getattr(model, "pretrained_cfg", None)
    mean, std = (_field(config, name) for name in ("mean", "std"))
    if mean is not None and std is not None and len(mean) == len(std) == 3:
        return ImageInput(_channels(mean), _channels(std), "its pretrained_cfg", size)
    return _by_processor(model)


def _tied_size(model: nn.Module) -> int | None:
    """The side of the only square images that a vision transformer takes; None for networks that take others too."""
    patches = getattr(model, "patch_embed", None)  # timm
    size = patches.img_size if getattr(patches, "strict_img_size", False) else None  # type: ignore[union-attr]
    if isinstance(model, torchvision_models.VisionTransformer):
        size = (model.image_size, model.image_size)
    return int(size[0]) if isinstance(size, (tuple, list)) and size[0] == size[1] else None


def _torchvision_weights(weights: str | Path | None) -> Any:
    """The member of torchvision's enumerations that has a file's name, which carries a part of its hash."""
    if weights is None:
        return None
    name = Path(weights).name
    for model in torchvision_models.list_models(module=torchvision_models):
        for member in torchvision_models.get_model_weights(model):
            if member.url.rpartition("/")[2] == name:
                return member
    return None


def _by_processor(model: nn.Module) -> ImageInput | None:
    """What the image processor of a Hugging Face model says; nothing is downloaded for it."""
    origin = getattr(getattr(model, "config", None), "name_or_path", None)
    if not origin or not type(model).__module__.startswith("transformers."):
        return None
    from transformers import AutoImageProcessor

    try:
        processor: Any = AutoImageProcessor.from_pretrained(origin, local_files_only=True)
        return ImageInput(_channels(processor.image_mean), _channels(processor.image_std), f"the processor of {origin}")
    except (OSError, ValueError, AttributeError, TypeError, ImportError):
        return None


def _field(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _channels(values: Any) -> Channels:
    first, second, third = map(float, values)
    return first, second, third


class Adapted(nn.Module):
    """Turns images `[N, 3, H, W]` that were made one way into those that another network wants.

    Sizes are changed by bilinear interpolation, with antialiasing where images become smaller.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, given: ImageInput, wanted: ImageInput) -> None:
        super().__init__()
        mean, std, own_mean, own_std = (
            torch.tensor(values, dtype=torch.float64).reshape(3, 1, 1)
            for values in (given.mean, given.std, wanted.mean, wanted.std)
        )
        self.register_buffer("scale", (std / own_std).float())
        self.register_buffer("shift", ((mean - own_mean) / own_std).float())
        self.size = wanted.size

    def forward(self, images: Tensor) -> Tensor:
        """Return the images in the type that they come in."""
        own = images.float()
        if self.size is not None and self.size != images.shape[-1]:
            own = interpolate(own, (self.size, self.size), mode="bilinear", antialias=True)
        return torch.addcmul(self.shift, own, self.scale).to(images.dtype)
