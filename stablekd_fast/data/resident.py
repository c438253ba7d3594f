"""Small images, kept in the memory of the device that trains: their views are cropped and normalised there."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from stablekd_fast.data.augmentation import Augmentation
from stablekd_fast.data.dataset import Channels
from stablekd_fast.data.split import Split, check_room
from stablekd_fast.data.views import crop_offsets_and_flips
from stablekd_fast.kernels import augment_batch

_NO_MEAN, _NO_STD = (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)
"""Normalised by these, values stay between 0 and 255."""


class ResidentImages:
    """The images of a split on `device`, and their views: padded, cropped and mirrored."""

    def __init__(self, split: Split, augmentation: Augmentation, view_seed: int, device: torch.device) -> None:
        self.split, self.augmentation, self.view_seed, self.device = split, augmentation, view_seed, device

    @cached_property
    def _images(self) -> Tensor:
        """uint8 `[N, H, W, 3]`, decoded and copied to the device when they are first needed."""
        images = self.split.images
        if images.device != self.device:
            count, height, width = images.shape[:3]
            check_room(count, height, width, self.device)
        return images.to(self.device)

    def normalised(
        self, positions: np.ndarray, view: int, mean: Channels, std: Channels, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """One view of the images at `positions` int64 `[N]`: `dtype` `[N, 3, H, W]`, in channels-last memory."""
        padding, ids = self.augmentation.padding, self.split.sample_ids.numpy()[positions]
        offsets, flips = crop_offsets_and_flips(self.view_seed, ids, view, padding, flip=self.augmentation.flip)
        rows, offsets, flips = (
            torch.from_numpy(part).to(self.device, non_blocking=True) for part in (positions, offsets, flips)
        )
        return augment_batch(self._images, rows, offsets, flips, padding=padding, mean=mean, std=std, dtype=dtype)

    def pixels(self, positions: np.ndarray, view: int) -> Tensor:
        """One view of the images at `positions` int64 `[N]`, not normalised: uint8 `[N, H, W, 3]`."""
        return self.normalised(positions, view, _NO_MEAN, _NO_STD).permute(0, 2, 3, 1).round().to(torch.uint8)
