"""timm's models by name, without weights or with published ones. Only this file imports timm, which is optional."""

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
        raise _unknown(timm, name)
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


def timm_weights(name: str, tag: str) -> tuple[str, Any]:
    """Return timm's full name of published weights, and its description of them, a `PretrainedCfg`.

    `tag` names weights of the model `name`; `pretrained` stands for the default ones. Raises ModelError for a model or
    weights that there are not, with those that there are.
    """
    timm = _timm()
    architecture, _, own = name.partition(".")
    if not timm.is_model(architecture):
        raise _unknown(timm, name)
    wanted = own if tag == "pretrained" else tag
    full = f"{architecture}.{wanted}" if wanted else architecture
    try:
        config = timm.get_pretrained_cfg(full)
    except RuntimeError:
        config = None
    if config is None or not config.has_weights:
        there = [other.partition(".")[2] for other in timm.list_pretrained(f"{architecture}.*")]
        listed = f"has {', '.join(['pretrained', *there])}" if there else "has none"
        raise ModelError(f"timm has no weights {tag!r} of {name}; it {listed}.")
    return full, config


def load_timm(source: str, classes: int, image_size: int | None) -> nn.Module:
    """Make a timm model with its published weights, which timm fetches unless it has them. `source` is a name of timm's
    or one that begins with hf-hub: or local-dir:. Raises what timm raises."""
    options: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    return _timm().create_model(source, pretrained=True, num_classes=classes, **options)


def _unknown(timm: Any, name: str) -> ModelError:
    near = difflib.get_close_matches(name, timm.list_models(), 5, 0.4)
    listed = f" The nearest: {', '.join(f'timm/{other}' for other in near)}." if near else ""
    return ModelError(f"timm {timm.__version__} has no model {name!r}.{listed}")


def _timm():
    try:
        import timm
    except ImportError as error:
        raise ModelError("Names that begin with timm/ need timm, which is not installed: pip install timm") from error
    return timm
