"""ShuffleNetV2 1× for CIFAR (Ma et al., arXiv 1807.11164): a 1×1 stem and no pooling before the stages.

Layout and names as in the distillation literature.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BasicUnit(nn.Module):
    """Transforms one half of the channels, keeps the other, shuffles: `[N, C, H, W]` → `[N, C, H, W]`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, 1, 1, groups=half, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        kept, out = x.chunk(2, 1)
        out = F.relu(self.bn1(self.conv1(out)))
        out = self.bn2(self.conv2(out))
        out = F.relu(self.bn3(self.conv3(out)))
        return _shuffled(kept, out)


class DownUnit(nn.Module):
    """Two strided branches over all channels, shuffled: `[N, C, H, W]` → `[N, C', H / 2, W / 2]`."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        half = width // 2
        self.conv1 = nn.Conv2d(width_in, width_in, 3, 2, 1, groups=width_in, bias=False)
        self.bn1 = nn.BatchNorm2d(width_in)
        self.conv2 = nn.Conv2d(width_in, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(width_in, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = nn.Conv2d(half, half, 3, 2, 1, groups=half, bias=False)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        left = self.bn1(self.conv1(x))
        left = F.relu(self.bn2(self.conv2(left)))
        right = F.relu(self.bn3(self.conv3(x)))
        right = self.bn4(self.conv4(right))
        right = F.relu(self.bn5(self.conv5(right)))
        return _shuffled(left, right)


class ShuffleNetV2(nn.Module):
    """Images `[N, 3, H, W]` → logits `[N, classes]`; `widths`: three stages and the last 1×1 layer."""

    def __init__(self, widths: tuple[int, int, int, int], num_classes: int) -> None:
        super().__init__()
        stem = 24
        self.conv1 = nn.Conv2d(3, stem, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu1 = nn.ReLU()
        self.layer1 = _stage(3, stem, widths[0])
        self.layer2 = _stage(7, widths[0], widths[1])
        self.layer3 = _stage(3, widths[1], widths[2])
        self.conv2 = nn.Conv2d(widths[2], widths[3], 1, bias=False)
        self.bn2 = nn.BatchNorm2d(widths[3])
        self.relu2 = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(widths[3], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = self.relu2(self.bn2(self.conv2(x)))
        return self.linear(self.avgpool(x).flatten(1))


def _stage(basic_units: int, width_in: int, width: int) -> nn.Sequential:
    return nn.Sequential(DownUnit(width_in, width), *(BasicUnit(width) for _ in range(basic_units)))


def _shuffled(first: Tensor, second: Tensor) -> Tensor:
    """Channels of both, alternating: twice `[N, C, H, W]` → `[N, 2C, H, W]`."""
    return torch.stack((first, second), 2).flatten(1, 2)


MODELS = {"shufflenet_v2": partial(ShuffleNetV2, (116, 232, 464, 1024))}
