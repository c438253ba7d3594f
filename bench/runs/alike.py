"""Runs of loops that are compared: from the same weights, over the same batches, which lie ready."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from stablekd_fast import models
from stablekd_fast.data import open_dataset
from stablekd_fast.errors import DataError
from stablekd_fast.integrations.views import SampleViews
from stablekd_fast.models.weights import restore_state

STEPS_TOLERANCE = 1e-5
"""How far losses and weights of two loops that compute the same may differ after all steps."""

STEPS = 50
CLASSES = 100


@dataclass(frozen=True)
class Setting:
    """The networks of the runs, and how long they are."""

    teacher: str = "resnet56"
    student: str = "resnet20"
    size: int = 32
    batch: int = 64
    batches: int = 10
    steps: int = STEPS
    lr: float = 1e-4
    """A low rate: at a usual one, networks of this depth amplify roundings beyond 1e-5 within fifty steps."""

    @property
    def count(self) -> int:
        """The number of images."""
        return self.batches * self.batch


class Noise:
    """Random images as a torchvision data set holds them."""

    transform = None

    def __init__(self, count: int, size: int) -> None:
        draw = np.random.default_rng(0).integers
        self.data, self.targets = draw(0, 256, (count, size, size, 3), dtype=np.uint8), draw(0, CLASSES, count).tolist()


class Pixels:
    """Images of a data set as a torchvision data set holds them. Raises DataError if they do not lie in memory."""

    transform = None

    def __init__(self, data: str, count: int) -> None:
        split = open_dataset(data).train
        if not split.resident:
            raise DataError(f"{data} has images of many sizes; give small ones of one size, e.g. CIFAR-10.")
        chosen = split.subset(count, 0)
        self.data, self.targets = chosen.images.numpy(), chosen.labels.tolist()


Images = Noise | Pixels


class Run:
    """Trains some steps from the same weights over the same batches; gives the losses, and all weights in one row."""

    def __init__(
        self,
        setting: Setting,
        student: nn.Module,
        batches: list,
        step: Callable[..., Tensor],
        restart: Callable[[], None],
    ) -> None:
        self.steps, self.student, self.batches = setting.steps, student, batches
        self.step, self.restart, self.start = step, restart, copy.deepcopy(student.state_dict())

    def __call__(self) -> tuple[Tensor, Tensor]:
        restore_state(self.student, self.start)
        self.restart()
        losses = [self.step(*self.batches[turn % len(self.batches)]) for turn in range(self.steps)]
        return torch.stack(losses), torch.cat([parameter.detach().flatten() for parameter in self.student.parameters()])


def fresh_networks(setting: Setting) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    teacher, student = (models.build(name, CLASSES, setting.size) for name in (setting.teacher, setting.student))
    return teacher, student


def ready_batches(setting: Setting, images: Images) -> tuple[SampleViews, list]:
    views = SampleViews(images, views=1, batch_size=setting.batch, mean=(0.5,) * 3, std=(0.25,) * 3)
    views.set_epoch(0)
    return views, list(DataLoader(views, batch_size=setting.batch))


def settled(teacher: nn.Module, batches: list) -> nn.Module:
    """Give the teacher batch-norm statistics of the data, without which activations fade."""
    with torch.no_grad():
        for images, *_ in batches:
            teacher.train()(images)
    return teacher.eval()


def named(setting: Setting) -> str:
    return (
        f"{setting.steps} steps, {setting.teacher} to {setting.student}, {setting.size} px, batches of {setting.batch}"
    )
