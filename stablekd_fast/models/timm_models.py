"""timm's models by name, without weights. The only place that imports timm, which is optional."""

import difflib
from typing import Any

from torch import nn

from stablekd_fast.errors import ModelError


def build_timm(name: str, num_classes: int, image_size: int | None) -> nn.Module:
    """The timm model `name` (no prefix); `image_size` (pixels, square) passed where a model is tied to one.

    Raises ModelError if timm is not installed, has no such model, or cannot make it for that size.
    """
    timm = _timm()
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(name, timm.list_models(), 5, 0.4)
        listed = f" The nearest: {', '.join(f'timm/{other}' for other in near)}." if near else ""
        raise ModelError(f"timm {timm.__version__} has no model {name!r}.{listed}")
    options: dict[str, Any] = {"num_classes": num_classes}
    default = timm.get_pretrained_cfg(architecture, allow_unregistered=True)
    if image_size is not None and default is not None and default.fixed_input_size:
        options["img_size"] = image_size
    try:
        return timm.create_model(name, pretrained=False, **options)
    except (ValueError, TypeError, AssertionError, RuntimeError) as error:
        raise ModelError(
            f"timm/{name} cannot be built for {num_classes} classes and image size {image_size} ({error}). "
            "Choose an image size that fits, or another model."
        ) from error


def _timm():
    try:
        import timm
    except ImportError as error:
        raise ModelError("Names that begin with timm/ need timm, which is not installed: pip install timm") from error
    return timm
