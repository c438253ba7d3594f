"""Images that are made while a run trains, and batches of them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from stablekd_fast.data.augmentation import Augmentation
from stablekd_fast.data.dataset import Channels
from stablekd_fast.data.source import TrainSource
from stablekd_fast.data.split import Split
from stablekd_fast.data.views import epoch_order


class Bank(Split):
    """A memory of images that were made, in the place of a split. Sample ids are places in it.

    It begins with noise, for whoever needs an example of the shape, and is filled from its first place on; when all are
    taken, new images replace the oldest.
    """

    def __init__(self, count: int, size: tuple[int, int], device: torch.device | str = "cpu") -> None:
        noise = torch.randint(256, (count, *size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        super().__init__(torch.zeros(count, dtype=torch.int64), images=noise.to(device))
        self.made = 0
        """Images that were put in, those that were replaced too."""

    def put(self, images: Tensor, labels: Tensor) -> None:
        """Keep images `[N, 3, H, W]` from 0 to 1, rounded to bytes, with their classes int64 `[N]`."""
        count = len(self)
        places = torch.arange(self.made, self.made + len(images)) % count
        self.images[places.to(self.images.device)] = (255 * images.clamp(0, 1)).round().byte().permute(0, 2, 3, 1)
        self.labels[places] = labels.to(self.labels.device)
        self.made += len(images)

    @property
    def filled(self) -> int:
        """Places that hold an image; all of them while there is only noise."""
        return min(self.made, len(self)) or len(self)

    def identity(self) -> dict:
        """Return what the sample ids stand for: nothing that a resumed run could find changed."""
        return {"samples": len(self), "digest": "made"}

    def state(self) -> dict[str, Tensor]:
        """Return what was put in, by name."""
        return {
            "images": self.images[: min(self.made, len(self))],
            "labels": self.labels[: min(self.made, len(self))],
            "made": torch.tensor(self.made),
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        images, labels = state["images"], state["labels"]
        self.images[: len(images)] = images.to(self.images.device)
        self.labels[: len(labels)] = labels
        self.made = int(state["made"])


class BankSource(TrainSource):
    """Batches of the images that a bank holds when each is asked for. Every step draws anew, without putting back, and
    shows new views."""

    bank: Bank

    def __init__(
        self,
        bank: Bank,
        augmentation: Augmentation,
        mean: Channels,
        std: Channels,
        *,
        batch_size: int,
        seed: int,
        view_seed: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.bank = bank
        super().__init__(
            bank, augmentation, mean, std, batch_size=batch_size, seed=seed, view_seed=view_seed, device=device
        )

    def positions(self, step: int) -> np.ndarray:
        """Return which images make the batch of a step: places in the bank, int64 `[N]`; some come again where the bank
        holds fewer than a batch."""
        order = epoch_order(self.seed, step, self.bank.filled)
        return self._own(np.resize(order, self.batch_size))

    def _view(self, step: int) -> int:
        return step
