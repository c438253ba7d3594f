"""A batch of images and labels, and how its images are normalised."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stablekd_fast.data.dataset import Channels
from stablekd_fast.errors import ConfigError
from stablekd_fast.kernels import augment_batch


@dataclass(frozen=True)
class Batch:
    """`sample_ids` int64 `[N]`; `view` (-1: unchanged images; None: crops that have no name); `images` `[N, 3, H, W]`,
    normalised, float32 unless asked for otherwise, and channels last in memory (None where nobody needs them);
    `labels` int64 `[N]`, or probabilities float32 `[N, classes]` where images are mixed, or int64 `[N, 0]` where images
    have none; `second` like `images`, in
    another view, where a loss asks for it (see `second.py`)."""

    sample_ids: Tensor
    view: int | None
    images: Tensor | None
    labels: Tensor
    second: Tensor | None = None

    @property
    def pixels(self) -> Tensor:
        """The images of a batch that was made with them."""
        assert self.images is not None, "this batch was asked for without images"
        return self.images


def normalised(
    images: Tensor, mean: Channels, std: Channels, flips: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return uint8 `[N, H, W, 3]` as `dtype` `[N, 3, H, W]`, mirrored where `flips` bool `[N]` says so."""
    count, device = len(images), images.device
    rows, nowhere = torch.arange(count, device=device), torch.zeros(count, 2, dtype=torch.int64, device=device)
    flips = torch.zeros(count, dtype=torch.bool, device=device) if flips is None else flips
    return augment_batch(images, rows, nowhere, flips, padding=0, mean=mean, std=std, dtype=dtype)


def check_settings(mean: Channels, std: Channels, batch_size: int, workers: int) -> None:
    """Raise ConfigError where the settings that all sources have cannot be used."""
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ConfigError(f"Mean and std need three numbers each, std above 0; got {mean} and {std}.")
    if batch_size < 1:
        raise ConfigError(f"The batch size must be at least 1, got {batch_size}.")
    if workers < 0:
        raise ConfigError(f"The number of workers must be 0 or more, got {workers}.")
