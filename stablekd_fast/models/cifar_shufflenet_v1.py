"""ShuffleNet 1x with three groups for CIFAR (Zhang et al., arXiv 1707.01083): a 1x1 stem, no pooling before the stages.

Layout and names as in the distillation literature.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GROUPS, STEM = 3, 24


class Unit(nn.Module):
    """Grouped 1x1, shuffle, depthwise 3x3, grouped 1x1 beside a shortcut: `[N, C, H, W]` → `[N, C', H', W']`.

    With `stride` 2 the shortcut is the pooled input, and its channels stand behind the others.
    """

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        own = width - width_in if stride == 2 else width
        inside, groups = own // 4, 1 if width_in == STEM else GROUPS
        self.stride, self.groups = stride, groups
        self.conv1 = nn.Conv2d(width_in, inside, 1, groups=groups, bias=False)
        self.bn1 = nn.BatchNorm2d(inside)
        self.conv2 = nn.Conv2d(inside, inside, 3, stride, 1, groups=inside, bias=False)
        self.bn2 = nn.BatchNorm2d(inside)
        self.conv3 = nn.Conv2d(inside, own, 1, groups=GROUPS, bias=False)
        self.bn3 = nn.BatchNorm2d(own)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = out.unflatten(1, (self.groups, -1)).transpose(1, 2).flatten(1, 2)
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.stride == 2:
            return F.relu(torch.cat((out, F.avg_pool2d(x, 3, 2, 1)), 1))
        return F.relu(out + x)


class ShuffleNetV1(nn.Module):
    """Images `[N, 3, H, W]` → logits `[N, classes]`; `widths` and `units` of three stages."""

    def __init__(self, widths: tuple[int, int, int], units: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, STEM, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM)
        self.relu = nn.ReLU()
        inputs = (STEM, *widths[:-1])
        self.layer1, self.layer2, self.layer3 = map(_stage, units, inputs, widths)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(self.avgpool(x).flatten(1))


def _stage(units: int, width_in: int, width: int) -> nn.Sequential:
    return nn.Sequential(Unit(width_in, width, 2), *(Unit(width, width, 1) for _ in range(units - 1)))


MODELS = {"shufflenet_v1": partial(ShuffleNetV1, (240, 480, 960), (4, 8, 4))}
