"""torchvision's classification models by name, without weights, and variants of them."""

from functools import partial
from typing import Any

import torchvision
from torch import nn
from torchvision.models import VisionTransformer

from stablekd_fast.errors import ModelError

DEFAULT_IMAGE_SIZE = 224

# Auxiliary classifiers would make the output a tuple in train mode.
_ONE_OUTPUT = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}


def torchvision_names() -> list[str]:
    """All of torchvision's classification models."""
    return torchvision.models.list_models(module=torchvision.models)


def build_torchvision(name: str, num_classes: int, image_size: int | None) -> nn.Module:
    """The torchvision model `name`; `image_size` (pixels, square) matters to vision transformers and MaxViT.

    Raises ModelError if the model cannot be made for that size.
    """
    options = {"weights": None, "num_classes": num_classes, **_ONE_OUTPUT.get(name, {})}
    if image_size is not None and name.startswith("vit_"):
        options["image_size"] = image_size
    if image_size is not None and name.startswith("maxvit"):
        options["input_size"] = (image_size, image_size)
    try:
        return torchvision.models.get_model(name, **options)
    except (ValueError, AssertionError) as error:
        raise _wrong_size(name, image_size, error) from error


def torchvision_weights(name: str, tag: str) -> Any:
    """Return the member of torchvision's enumeration of the weights of a model. `pretrained` is the default one.

    Raises ModelError for a model or weights that there are not.
    """
    if name not in torchvision_names():
        raise ModelError(
            f"torchvision has no classification model {name!r}; {len(torchvision_names())} others are known."
        )
    members = torchvision.models.get_model_weights(name)
    if tag not in ("pretrained", "DEFAULT", *(member.name for member in members)):
        there = ", ".join(["DEFAULT", *(member.name for member in members)]) if len(members) else "none"
        raise ModelError(f"torchvision has no weights {tag!r} of {name}; it has {there}.")
    return members["DEFAULT" if tag == "pretrained" else tag]


def vit_b_16_6l(num_classes: int, image_size: int | None) -> nn.Module:
    """torchvision's `vit_b_16` (Dosovitskiy et al., arXiv 2010.11929) with 6 layers in place of 12.

    Raises ModelError if patches of 16 pixels do not divide `image_size`.
    """
    try:
        return VisionTransformer(
            image_size=image_size or DEFAULT_IMAGE_SIZE,
            patch_size=16,
            num_layers=6,
            num_heads=12,
            hidden_dim=768,
            mlp_dim=3072,
            num_classes=num_classes,
        )
    except AssertionError as error:
        raise _wrong_size("vit_b_16_6l", image_size, error) from error


def _for_small_images(name: str, num_classes: int, image_size: int | None) -> nn.Module:
    """torchvision's ResNet with a stem of one 3x3 convolution and no pooling, as the literature on CIFAR-100 has it."""
    model = torchvision.models.get_model(name, weights=None, num_classes=num_classes)
    model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model


def _wrong_size(name: str, image_size: int | None, error: Exception) -> ModelError:
    reason = str(error).partition("\n")[0].rstrip(".!")
    return ModelError(
        f"{name} cannot be built for images of {image_size}x{image_size} pixels ({reason}). "
        f"Choose an image size that fits (it is made for {DEFAULT_IMAGE_SIZE}), or another model."
    )


MODELS = {
    "vit_b_16_6l": vit_b_16_6l,
    **{f"{name}_cifar": partial(_for_small_images, name) for name in ("resnet18", "resnet34", "resnet50")},
}
