import pytest
import torch
from torch import nn

from stablekd_fast.config import DistillConfig
from stablekd_fast.data import open_dataset
from stablekd_fast.diagnose.settings import Probing
from stablekd_fast.diagnose.training import Twin
from stablekd_fast.engine.schedule import Optimizer
from stablekd_fast.run.materials import Given, gather


def net(seed: int, dropout: float = 0.0) -> nn.Sequential:
    """Two convolutional stages and a classifier for ten classes."""
    torch.manual_seed(seed)
    stages = [
        nn.Sequential(nn.Conv2d(inside, width, 3, stride, 1), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(dropout))
        for inside, width, stride in ((3, 8, 2), (8, 16, 2))
    ]
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


@pytest.fixture(autouse=True)
def no_more_threads(one_thread):
    """One for all of these tests."""


@pytest.fixture(scope="session")
def digits():
    return open_dataset("digits")


@pytest.fixture
def twin(digits):
    """Both arms of one seed of a small pair on the digits: `twin(dropout=0.5, align="ends", ...)`."""

    def build(dropout: float = 0.0, probing: Probing | None = None, **settings) -> Twin:
        defaults = {"subset": 160, "batch_size": 32, "cuts": ["0", "1"], "device": "cpu", "precision": "fp32"}
        config = DistillConfig(**{**defaults, "optimizer": Optimizer(lr=0.02), **settings})
        parts = gather(config, Given(teacher=net(1), student=net(2, dropout), dataset=digits))
        return Twin(parts, probing or Probing(steps=6, probes=3, probe_batches=3))

    return build
