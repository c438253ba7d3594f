"""VGG networks for CIFAR as the distillation literature uses them: batch norm, one linear classifier.

Features of Simonyan and Zisserman (arXiv 1409.1556), configurations A, B, D and E; `vgg8` has one convolution
per block. There are three poolings, whatever the image size: after blocks 0, 1 and 2.
"""

from functools import partial

from torch import Tensor, nn

from stablekd_fast.models.initialise import kaiming_convolutions, small_classifier

WIDTHS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """Block i has `convolutions[i]` layers: images `[N, 3, H, W]`, H and W ≥ 8, → logits `[N, classes]`."""

    def __init__(self, convolutions: tuple[int, int, int, int, int], num_classes: int) -> None:
        super().__init__()
        inputs = (3, *WIDTHS[:-1])
        self.block0, self.block1, self.block2, self.block3, self.block4 = map(_block, convolutions, inputs, WIDTHS)
        self.pool0 = nn.MaxPool2d(2)
        self.pool1 = nn.MaxPool2d(2)
        self.pool2 = nn.MaxPool2d(2)
        self.pool4 = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(WIDTHS[-1], num_classes)
        kaiming_convolutions(self)
        small_classifier(self.classifier)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool0(self.block0(x))
        x = self.pool1(self.block1(x))
        x = self.pool2(self.block2(x))
        x = self.pool4(self.block4(self.block3(x)))
        return self.classifier(x.flatten(1))


def _block(convolutions: int, width_in: int, width: int) -> nn.Sequential:
    layers = []
    for inputs in (width_in, *[width] * (convolutions - 1)):
        layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers)


MODELS = {
    "vgg8": partial(VGG, (1, 1, 1, 1, 1)),
    "vgg11": partial(VGG, (1, 1, 2, 2, 2)),
    "vgg13": partial(VGG, (2, 2, 2, 2, 2)),
    "vgg16": partial(VGG, (2, 2, 3, 3, 3)),
    "vgg19": partial(VGG, (2, 2, 4, 4, 4)),
}
