"""Repositories of the Hugging Face hub, and folders that hold what such a repository holds: of timm or transformers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from stablekd_fast.errors import ModelError
from stablekd_fast.files.reading import read_document

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_LARGEST_CONFIG = 1 << 24
_CLASSIFIER = "ForImageClassification"


class Facts(NamedTuple):
    """What a repository says of its network: how many classes it has (0: no classifier), and what a card says."""

    classes: int
    card: dict[str, Any]


def place_of(text: str) -> tuple[str, str]:
    """Return the folder or the repository OWNER/NAME that `text` names, and the revision behind an @ or an empty text.

    Raises ModelError for anything else.
    """
    if Path(text).expanduser().is_dir():
        return str(Path(text).expanduser()), ""
    place, _, revision = text.partition("@")
    if not _REPOSITORY.fullmatch(place):
        raise ModelError(
            f"{text!r} is neither a folder nor a repository of the Hugging Face hub; give hf:OWNER/NAME, or hf:FOLDER."
        )
    return place, revision


def config_of(place: str, revision: str) -> Mapping[str, Any]:
    """Read config.json of a folder, or of a repository, from which it is fetched unless it is in the cache.

    Raises ModelError for one of neither library; what the hub's library raises where it cannot be had.
    """
    path = Path(place) / "config.json"
    if not Path(place).is_dir():
        path = Path(_library().hf_hub_download(place, "config.json", revision=revision or None))
    config = json.loads(read_document(path, _LARGEST_CONFIG))
    if not isinstance(config, dict) or not ("architecture" in config or config.get("architectures")):
        raise ModelError(
            f"{path} names neither an architecture of timm nor architectures of transformers; give a repository, or a "
            "folder, that one of these libraries wrote."
        )
    return config


def remedy(place: str) -> str:
    """Say what to put where so that a repository can be loaded without a network."""
    if Path(place).is_dir():
        return "Have the library that wrote this folder write it anew."
    cache = _library().constants.HF_HUB_CACHE
    return (
        f"Where the network is reached, `hf download {place} --local-dir FOLDER` fetches it: bring that folder here "
        f"and give hf:FOLDER, or bring models--{place.replace('/', '--')} from a cache that has it into {cache}."
    )


def timm_source(place: str, revision: str) -> str:
    """Return what timm calls a folder or a repository."""
    if Path(place).is_dir():
        return f"local-dir:{place}"
    return f"hf-hub:{place}@{revision}" if revision else f"hf-hub:{place}"


def timm_facts(config: Mapping[str, Any]) -> Facts:
    """Return what a config.json of timm says."""
    own = config.get("pretrained_cfg", config)
    names = config.get("label_names") or own.get("label_names")
    described = {**own, **{key: config[key] for key in ("num_classes",) if key in config}, "label_names": names}
    return Facts(int(described["num_classes"]), timm_card(described))


def timm_card(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what timm's description of weights says that a card says too."""
    card: dict[str, Any] = {name: list(config[name]) for name in ("mean", "std") if config.get(name)}
    if config.get("input_size"):
        card["image_size"] = int(config["input_size"][-1])
    names = list(config.get("label_names") or [])
    return {**card, "classes": names} if names and len(names) == config.get("num_classes") else card


def transformers_facts(place: str, revision: str, config: Mapping[str, Any]) -> Facts:
    """Return what a config.json of transformers, and the image processor beside it, say. A network that classifies no
    images has no classes."""
    classifies = any(name.endswith(_CLASSIFIER) for name in config["architectures"])
    full = _transformers().AutoConfig.from_pretrained(place, **_at(revision))
    named = {int(number): name for number, name in (full.id2label or {}).items()} if classifies else {}
    names = [named[number] for number in sorted(named)]
    card: dict[str, Any] = {}
    if names and not all(name == f"LABEL_{number}" for number, name in enumerate(names)):
        card["classes"] = names
    try:
        processor: Any = _transformers().AutoImageProcessor.from_pretrained(place, **_at(revision))
        card |= {"mean": list(processor.image_mean), "std": list(processor.image_std)}
    except (OSError, ValueError, AttributeError, TypeError):  # no processor lies beside the network
        processor = None
    size = _side(processor)
    return Facts(len(names), {**card, "image_size": size} if size else card)


def load_transformers(place: str, revision: str, classes: int, own: int) -> nn.Module:
    """Load a network of transformers with its weights: with its own classifier where it has one for so many `classes`,
    without any for 0 classes, else with one of random weights."""
    library = _transformers()
    if classes == 0:
        return library.AutoModel.from_pretrained(place, **_at(revision))
    other = {} if classes == own else {"num_labels": classes, "ignore_mismatched_sizes": True}
    return library.AutoModelForImageClassification.from_pretrained(place, **_at(revision), **other)


def _side(processor: Any) -> int | None:
    """The side of the square images that an image processor makes, if it says so."""
    cut = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None
    size = cut or getattr(processor, "size", None) or {}
    size = size if isinstance(size, Mapping) else getattr(size, "__dict__", {})
    height = size.get("height") or size.get("shortest_edge")
    return int(height) if height else None


def _at(revision: str) -> dict[str, str]:
    return {"revision": revision} if revision else {}


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise _missing("huggingface_hub") from error
    return huggingface_hub


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise _missing("transformers") from error
    return transformers


def _missing(library: str) -> ModelError:
    return ModelError(f"This name needs {library}, which is not installed: pip install {library}")
