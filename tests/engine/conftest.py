import pytest
import torch
from torch import nn

from stablekd_fast.config import DistillConfig
from stablekd_fast.data import open_dataset
from stablekd_fast.distiller import Distiller
from stablekd_fast.schedule import Optimizer


def small_net(depth: int, seed: int) -> nn.Sequential:
    """Three stages on 8x8 images and a classifier for ten classes; quick to train."""
    torch.manual_seed(seed)
    stages = []
    for inside, width, stride in ((3, 8, 1), (8, 16, 2), (16, 16, 2)):
        layers = [nn.Conv2d(inside, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        for _ in range(depth - 1):
            layers += [nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        stages.append(nn.Sequential(*layers))
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


@pytest.fixture(name="small_net")
def small_net_fixture():
    return small_net


@pytest.fixture(scope="session")
def digits():
    return open_dataset("digits")


@pytest.fixture
def make(tmp_path, digits):
    """A small run on the digits: `make(method="kd", out="a", ...)` gives a Distiller."""

    def build(out: str = "run", **settings) -> Distiller:
        defaults = {
            "epochs": 3.0,
            "subset": 160,
            "validation": 40,
            "batch_size": 32,
            "log_every": 2,
            "bn_batches": 2,
            "cuts": ["0", "1", "2"],
            "optimizer": Optimizer(lr=0.01),
            "device": "cpu",
            "precision": "fp32",
        }
        config = DistillConfig(out=str(tmp_path / out), **{**defaults, **settings})
        return Distiller(config, teacher=small_net(2, 1), student=small_net(1, 2), dataset=digits)

    return build
