"""A network that an auxiliary loss asks and nobody trains."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class Frozen(nn.Module):
    """A copy of a network that stays in evaluation mode. Its weights lie in checkpoints, as it is not a run's teacher.

    It gives no gradient, neither to its weights nor to images.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> Frozen:
        """Stay in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return what the network gives for images `[N, C, H, W]`."""
        return self.network(images)
