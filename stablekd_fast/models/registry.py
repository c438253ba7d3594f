"""Models by name. A family is one file with a dict `MODELS` of builders, entered in `OWN_MODELS`."""

import difflib
from collections.abc import Callable, Mapping

from torch import nn

from stablekd_fast.errors import ModelError
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
from stablekd_fast.models.score_models import build_score_model
from stablekd_fast.models.timm_models import build_timm
from stablekd_fast.models.torchvision_models import build_torchvision, torchvision_names

Builder = Callable[[int, int | None], nn.Module]
"""Makes a model from `(num_classes, image_size)`."""
NamedBuilder = Callable[[str, int, int | None], nn.Module]
"""Makes a model from `(name, num_classes, image_size)`."""


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


REUSING = "simkd/"
"""Before the names of a student and of its teacher: the student that ends in the teacher's classifier."""
_FAMILIES: dict[str, NamedBuilder] = {}


def add_family(start: str, builder: NamedBuilder) -> None:
    """Have `build` make models whose names begin with `start` by a builder of rooms above this one."""
    _FAMILIES[start] = builder


def build(name: str, num_classes: int, image_size: int | None = None) -> nn.Module:
    """A model with random weights (global generator): images `[N, 3, H, W]` → logits `[N, num_classes]`.

    `name` is one of `names()`, or `timm/NAME` where timm is installed; or `mf/WIDTH`, which maps numbers of users
    int64 `[N]` to scores `[N, num_classes]`, and for which `image_size` is the number of users; or, where
    `stablekd_fast.blocks` is imported, `simkd/STUDENT+TEACHER`, a student that ends in its teacher's classifier.
    Where one of our own models and one of torchvision's share a name, the plain name is ours and `torchvision/NAME` is
    theirs. `image_size` (pixels, square) matters only to models that are tied to one, such as vision transformers.

    Raises ModelError for an unknown name (with the nearest ones) or a size that the model cannot be made for.
    """
    if num_classes < 1:
        raise ModelError(f"{name} was asked for {num_classes} classes; at least 1 is needed.")
    if image_size is not None and image_size < 1:
        raise ModelError(f"{name} was asked for images of {image_size} pixels; a positive size is needed.")
    name = ALIASES.get(name, name)
    if name in OWN_MODELS:
        return OWN_MODELS[name](num_classes, image_size)
    if name.startswith("mf/"):
        return build_score_model(name, num_classes, image_size)
    if name.startswith("timm/"):
        return build_timm(name.removeprefix("timm/"), num_classes, image_size)
    for start, builder in _FAMILIES.items():
        if name.startswith(start):
            return builder(name, num_classes, image_size)
    plain = name.removeprefix("torchvision/")
    if plain in torchvision_names():
        return build_torchvision(plain, num_classes, image_size)
    raise _unknown(name)


def names() -> list[str]:
    """Every name that `build` knows, our own first. timm's are not listed: ask `timm.list_models()`."""
    theirs = (f"torchvision/{name}" if name in OWN_MODELS else name for name in torchvision_names())
    return [*OWN_MODELS, *theirs]


def _unknown(name: str) -> ModelError:
    known = {valid.removeprefix("torchvision/"): valid for valid in reversed(names())}
    near = difflib.get_close_matches(name.removeprefix("torchvision/").lower(), known, 5, 0.5)
    hint = f"The nearest: {', '.join(known[word] for word in near)}" if near else f"Our own: {', '.join(OWN_MODELS)}"
    return ModelError(f"There is no model {name!r}. {hint}. torchvision's names and timm/NAME are known too.")
