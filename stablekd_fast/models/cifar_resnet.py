"""Residual networks for CIFAR, in the two dialects that weight files come in.

- `resnet8` to `resnet110`: He et al. (arXiv 1512.03385, section 4.2) with parameter-free shortcuts
  ("option A") and the classifier named `linear`.
- `resnet8_fc` to `resnet110_fc`, and the wide `resnet8x4` and `resnet32x4`: those of the distillation literature (Tian
  et al., "Contrastive Representation Distillation"), with projection shortcuts named `downsample` and the classifier
  named `fc`.
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from stablekd_fast.models.initialise import kaiming_convolutions

Shortcut = Callable[[int, int, int], nn.Module]


class PaddedShortcut(nn.Module):
    """Every `stride`-th pixel; zero channels, half on each side: `[N, C, H, W]` → `[N, C', H', W']`."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        before = (width - width_in) // 2
        self.padding = (0, 0, 0, 0, before, width - width_in - before)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], self.padding)


def projection_shortcut(width_in: int, width: int, stride: int) -> nn.Module:
    """A strided 1×1 convolution with batch norm: `[N, C, H, W]` → `[N, C', H', W']`."""
    return nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut: `[N, C, H, W]` → `[N, C', H', W']`."""

    def __init__(self, width_in: int, width: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        changes_shape = stride != 1 or width_in != width
        self.downsample = shortcut(width_in, width, stride) if changes_shape else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.downsample(x))


class _ThreeStages(nn.Module):
    """Stem and three stages of basic blocks; the second and the third halve the resolution."""

    def __init__(self, depth: int, widths: tuple[int, int, int, int], shortcut: Shortcut) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        stem, *stages = widths
        self.conv1 = nn.Conv2d(3, stem, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU()
        self.layer1 = _stage(blocks, stem, stages[0], 1, shortcut)
        self.layer2 = _stage(blocks, stages[0], stages[1], 2, shortcut)
        self.layer3 = _stage(blocks, stages[1], stages[2], 2, shortcut)
        self.avgpool = nn.AdaptiveAvgPool2d(1)

    def features(self, x: Tensor) -> Tensor:
        """Images `[N, 3, H, W]` to `[N, C]`, the mean over all pixels of the last stage."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.avgpool(x).flatten(1)


class PaddedResNet(_ThreeStages):
    """`6n + 2` layers, parameter-free shortcuts: images `[N, 3, H, W]` → logits `[N, classes]`."""

    def __init__(self, depth: int, num_classes: int, width: int = 16) -> None:
        super().__init__(depth, (width, width, 2 * width, 4 * width), PaddedShortcut)
        self.linear = nn.Linear(4 * width, num_classes)
        kaiming_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.features(x))


class ProjectedResNet(_ThreeStages):
    """`6n + 2` layers, projection shortcuts: images `[N, 3, H, W]` → logits `[N, classes]`."""

    def __init__(self, depth: int, num_classes: int, widths: tuple[int, int, int, int]) -> None:
        super().__init__(depth, widths, projection_shortcut)
        self.fc = nn.Linear(widths[-1], num_classes)
        kaiming_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x))


def _stage(blocks: int, width_in: int, width: int, stride: int, shortcut: Shortcut) -> nn.Sequential:
    first = BasicBlock(width_in, width, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(width, width, 1, shortcut) for _ in range(blocks - 1)))


_DEPTHS = (8, 14, 20, 32, 44, 56, 110)

MODELS = {
    **{f"resnet{depth}": partial(PaddedResNet, depth) for depth in _DEPTHS},
    **{f"resnet{depth}_fc": partial(ProjectedResNet, depth, widths=(16, 16, 32, 64)) for depth in _DEPTHS},
    "resnet20_half": partial(PaddedResNet, 20, width=8),
    "resnet8x4": partial(ProjectedResNet, 8, widths=(32, 64, 128, 256)),
    "resnet32x4": partial(ProjectedResNet, 32, widths=(32, 64, 128, 256)),
}
