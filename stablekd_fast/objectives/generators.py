"""Small convolutional networks that make images, and that tell made ones from real ones."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from stablekd_fast.errors import ConfigError

_UPSAMPLED = 4
"""The side of the images is so many times that of the first map."""


class ImageGenerator(nn.Module):
    """Maps codes `[N, latent]` to images `[N, 3, H, W]` from 0 to 1.

    A linear layer gives a map of a quarter of the size; two convolutions follow, each behind an enlargement by two, and
    one that gives the channels. Norms take the statistics of the batch, unless they are asked to `remember` them.
    """

    def __init__(self, latent: int, size: tuple[int, int], width: int = 64, remember: bool = False) -> None:
        super().__init__()
        height, side = (length // _UPSAMPLED for length in size)
        if [height * _UPSAMPLED, side * _UPSAMPLED] != list(size):
            raise ConfigError(
                f"Images of {size[1]} x {size[0]} pixels were asked for, but the generator's sides are multiples of "
                f"{_UPSAMPLED}; give such an --image-size."
            )
        self.first, self.shape = nn.Linear(latent, 2 * width * height * side), (2 * width, height, side)
        kept = {"track_running_stats": remember}
        self.layers = nn.Sequential(
            nn.BatchNorm2d(2 * width, **kept),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=False),
            nn.BatchNorm2d(2 * width, **kept),
            nn.LeakyReLU(0.2),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width, **kept),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 3, 3, padding=1),
            nn.Sigmoid(),
        )

    def forward(self, codes: Tensor) -> Tensor:
        return self.layers(self.first(codes).view(len(codes), *self.shape))


class Normalise(nn.Module):
    """Brings images `[N, 3, H, W]` from 0 to 1 to the mean and the standard deviation that networks want."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


class Discriminator(nn.Module):
    """Maps images `[N, 3, H, W]`, normalised, to the logits `[N]` that they are real."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.LeakyReLU(0.2),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(16 * 2 * width, 1),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).squeeze(1)


Kept = TypeVar("Kept", bound=nn.Module)


def frozen(network: Kept) -> Kept:
    """Make buffers of the parameters of a network, in place, and return it."""
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            del module._parameters[name]
            module.register_buffer(name, parameter.detach())
    return network
