"""Images as they should come out of a source, computed by other means, in float64."""

import numpy as np
import torch
import torch.nn.functional as F

from stablekd_fast.data import Split

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def small_split(count=22) -> Split:
    """Random images of 6 x 5 pixels, of three classes in turn."""
    images = np.random.default_rng(0).integers(0, 256, (count, 6, 5, 3), dtype=np.uint8)
    return Split(torch.arange(count) % 3, images=torch.from_numpy(images))


def normalised(image: np.ndarray) -> torch.Tensor:
    """uint8 `[H, W, 3]` to float64 `[3, H, W]`."""
    return torch.from_numpy(((image / 255 - np.array(MEAN)) / np.array(STD)).transpose(2, 0, 1))


def scaled(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 `[H, W, 3]` to float64 `[height, width, 3]`: bilinear with antialiasing, not rounded."""
    planes = torch.from_numpy(image.copy()).double().permute(2, 0, 1)[None]
    return F.interpolate(planes, size=(height, width), mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()


def assert_within_a_level(image: torch.Tensor, expected: np.ndarray):
    """Both passes of a change of size round to eight bits, so a level may be lost."""
    assert ((image.double() - normalised(expected)).abs() * torch.tensor(STD)[:, None, None] * 255).max() <= 1.02
