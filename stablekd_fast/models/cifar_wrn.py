"""Wide residual networks for CIFAR (Zagoruyko and Komodakis, arXiv 1605.07146), without dropout."""

from collections import OrderedDict
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from stablekd_fast.models.initialise import kaiming_convolutions


class PreActivationBlock(nn.Module):
    """Norm, ReLU, 3×3 convolution, twice, beside a shortcut: `[N, C, H, W]` → `[N, C', H', W']`.

    Where the width changes, the shortcut projects the activated input; elsewhere it is the raw input.
    """

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        # Named as in the published weight files.
        self.convShortcut = nn.Conv2d(width_in, width, 1, stride, bias=False) if width_in != width else None

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        shortcut = x if self.convShortcut is None else self.convShortcut(activated)
        return shortcut + out


class WideResNet(nn.Module):
    """WRN-`depth`-`factor` with depth `6n + 4`: images `[N, 3, H, W]` → logits `[N, classes]`."""

    def __init__(self, depth: int, factor: int, num_classes: int) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        widths = [16 * factor, 32 * factor, 64 * factor]
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.block1 = _stage(blocks, 16, widths[0], 1)
        self.block2 = _stage(blocks, widths[0], widths[1], 2)
        self.block3 = _stage(blocks, widths[1], widths[2], 2)
        self.bn1 = nn.BatchNorm2d(widths[2])
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[2], num_classes)
        kaiming_convolutions(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        x = self.avgpool(self.relu(self.bn1(x)))
        return self.fc(x.flatten(1))


def _stage(blocks: int, width_in: int, width: int, stride: int) -> nn.Sequential:
    first = PreActivationBlock(width_in, width, stride)
    layer = nn.Sequential(first, *(PreActivationBlock(width, width, 1) for _ in range(blocks - 1)))
    return nn.Sequential(OrderedDict(layer=layer))


MODELS = {f"wrn_{depth}_{factor}": partial(WideResNet, depth, factor) for depth in (40, 16) for factor in (2, 1)}
