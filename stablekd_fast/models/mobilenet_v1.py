"""MobileNet for ImageNet (Howard et al., arXiv 1704.04861), the second standard student of the distillation literature.

Names as in the weight files of that literature.
"""

from torch import Tensor, nn

from stablekd_fast.models.initialise import kaiming_convolutions

LAYERS = (
    # width, stride
    (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1), (512, 1), (512, 1), (512, 1), (512, 1),
    (1024, 2), (1024, 1),
)  # fmt: skip


class MobileNetV1(nn.Module):
    """Images `[N, 3, H, W]` → logits `[N, classes]`."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        width_in, layers = 32, [nn.Sequential(*_conv_bn_relu(3, 32, 3, 2))]
        for width, stride in LAYERS:
            depthwise = _conv_bn_relu(width_in, width_in, 3, stride, groups=width_in)
            layers.append(nn.Sequential(*depthwise, *_conv_bn_relu(width_in, width, 1)))
            width_in = width
        self.model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1))
        self.fc = nn.Linear(width_in, num_classes)
        kaiming_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.model(x).flatten(1))


def _conv_bn_relu(width_in: int, width: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(width_in, width, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(width), nn.ReLU()]


MODELS = {"mobilenet_v1": MobileNetV1}
