"""MobileNetV2 at half width for CIFAR (Sandler et al., arXiv 1801.04381).

As the distillation literature uses it: the stem halves the resolution, the second stage does not, and the
last layer keeps its full 1280 channels.
"""

from functools import partial

from torch import Tensor, nn

from stablekd_fast.models.initialise import kaiming_convolutions, small_classifier

STAGES = (
    # expansion, width, blocks, stride
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
LAST_WIDTH = 1280


class InvertedResidual(nn.Module):
    """Expand, depthwise 3×3, project without activation: `[N, C, H, W]` → `[N, C', H', W']`."""

    def __init__(self, width_in: int, width: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = width_in * expansion
        self.conv = nn.Sequential(
            *_conv_bn_relu(width_in, hidden, 1),
            *_conv_bn_relu(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, width, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.adds_input = stride == 1 and width_in == width

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.adds_input else self.conv(x)


class MobileNetV2(nn.Module):
    """Images `[N, 3, H, W]` → logits `[N, classes]`; `multiplier` ≤ 1 scales all widths but the last."""

    def __init__(self, multiplier: float, num_classes: int) -> None:
        super().__init__()
        width_in = int(32 * multiplier)
        self.conv1 = nn.Sequential(*_conv_bn_relu(3, width_in, 3, stride=2))
        stages = []
        for expansion, full_width, blocks, stride in STAGES:
            width = int(full_width * multiplier)
            stage = [InvertedResidual(width_in, width, stride, expansion)]
            stage += [InvertedResidual(width, width, 1, expansion) for _ in range(blocks - 1)]
            stages.append(nn.Sequential(*stage))
            width_in = width
        self.blocks = nn.Sequential(*stages)
        self.conv2 = nn.Sequential(*_conv_bn_relu(width_in, LAST_WIDTH, 1))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Linear(LAST_WIDTH, num_classes))
        kaiming_convolutions(self)
        small_classifier(self.classifier[0])

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.blocks(self.conv1(x)))
        return self.classifier(self.avgpool(x).flatten(1))


def _conv_bn_relu(width_in: int, width: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(width_in, width, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(width), nn.ReLU()]


MODELS = {"mobilenet_v2": partial(MobileNetV2, 0.5)}
