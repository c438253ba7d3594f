"""Initial weights of the CIFAR families."""

from torch import nn


def kaiming_convolutions(model: nn.Module) -> None:
    """Draw every convolution's weight from N(0, 2 / fan_out), its bias zero (He et al., arXiv 1502.01852).

    fan_out counts `kernel height × kernel width × output channels`, also for grouped convolutions.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def small_classifier(linear: nn.Module) -> None:
    """Draw a classifier's weight from N(0, 0.01²), its bias zero."""
    assert isinstance(linear, nn.Linear)
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
