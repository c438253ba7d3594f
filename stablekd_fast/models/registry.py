"""Models by name: of our own, of torchvision, timm and the Hugging Face hub, with published weights or without."""

import difflib
from collections.abc import Callable

from torch import nn

from stablekd_fast.errors import ModelError
from stablekd_fast.models.families import ALIASES, OWN_MODELS
from stablekd_fast.models.published import published, without_weights
from stablekd_fast.models.score_models import build_score_model
from stablekd_fast.models.timm_models import build_timm
from stablekd_fast.models.torchvision_models import build_torchvision, torchvision_names

NamedBuilder = Callable[[str, int, int | None], nn.Module]
"""Makes a model from `(name, num_classes, image_size)`."""

REUSING = "simkd/"
"""Before the names of a student and of its teacher: the student that ends in the teacher's classifier."""
_FAMILIES: dict[str, NamedBuilder] = {}


def add_family(start: str, builder: NamedBuilder) -> None:
    """Have `build` make models whose names begin with `start` by a builder of rooms above this one."""
    _FAMILIES[start] = builder


def build(name: str, num_classes: int, image_size: int | None = None, *, weights: bool = True) -> nn.Module:
    """A model with random weights (global generator): images `[N, 3, H, W]` → logits `[N, num_classes]`.

    `name` is one of `names()`, or `timm/NAME` where timm is installed; or `mf/WIDTH`, which maps numbers of users
    int64 `[N]` to scores `[N, num_classes]`, and for which `image_size` is the number of users; or, where
    `stablekd_fast.blocks` is imported, `simkd/STUDENT+TEACHER`, a student that ends in its teacher's classifier.
    Where one of our own models and one of torchvision's share a name, the plain name is ours and `torchvision/NAME` is
    theirs. `image_size` (pixels, square) matters only to models that are tied to one, such as vision transformers.

    Names that ask for published weights (`torchvision/NAME@WEIGHTS`, `timm/NAME@WEIGHTS`, `hf:OWNER/NAME`, see
    `published.py`) have them, fetched by the library that owns them; with `weights` false the same network without them
    is made, where it has a name of its own. No other name fetches anything.

    Raises ModelError for an unknown name (with the nearest ones) or a size that the model cannot be made for.
    """
    if num_classes < 1:
        raise ModelError(f"{name} was asked for {num_classes} classes; at least 1 is needed.")
    if image_size is not None and image_size < 1:
        raise ModelError(f"{name} was asked for images of {image_size} pixels; a positive size is needed.")
    name = ALIASES.get(name if weights else without_weights(name), name if weights else without_weights(name))
    found = published(name)
    if found is not None:
        return found.build(num_classes, image_size)
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
    return ModelError(
        f"There is no model {name!r}. {hint}. torchvision's names and timm/NAME are known too, and hf:OWNER/NAME."
    )
