"""Our own models by name. A family is one file with a dict `MODELS` of builders, entered in `OWN_MODELS`."""

from collections.abc import Callable, Mapping

from torch import nn

from stablekd_fast.models import (
    cifar_mobilenet_v2,
    cifar_resnet,
    cifar_shufflenet_v1,
    cifar_shufflenet_v2,
    cifar_vgg,
    cifar_wrn,
    mobilenet_v1,
    torchvision_models,
)

Builder = Callable[[int, int | None], nn.Module]
"""Makes a model from `(num_classes, image_size)`."""


def _of_any_size(builders: Mapping[str, Callable[..., nn.Module]]) -> dict[str, Builder]:
    def sized(builder: Callable[..., nn.Module]) -> Builder:
        return lambda num_classes, image_size: builder(num_classes=num_classes)

    return {name: sized(builder) for name, builder in builders.items()}


OWN_MODELS: dict[str, Builder] = {
    **_of_any_size(cifar_resnet.MODELS),
    **_of_any_size(cifar_wrn.MODELS),
    **_of_any_size(cifar_vgg.MODELS),
    **_of_any_size(cifar_shufflenet_v1.MODELS),
    **_of_any_size(cifar_shufflenet_v2.MODELS),
    **_of_any_size(cifar_mobilenet_v2.MODELS),
    **_of_any_size(mobilenet_v1.MODELS),
    **torchvision_models.MODELS,
}

ALIASES = {
    "MobileNetV1": "mobilenet_v1",
    "MobileNetV2": "mobilenet_v2",
    "ShuffleV1": "shufflenet_v1",
    "ShuffleV2": "shufflenet_v2",
}
"""What the distillation literature calls models of ours."""
