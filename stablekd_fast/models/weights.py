"""Weights from files into models: everything is compared first, then copied, and nothing is unpickled."""

import os
import pickle
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from stablekd_fast.errors import ModelError

_NESTS = ("state_dict", "model", "model_state_dict")
_PREFIXES = ("module.", "_orig_mod.")  # left behind by DataParallel and torch.compile
_COUNTER = "num_batches_tracked"
_SHOWN = 4


def load_weights(model: nn.Module, path: str | os.PathLike) -> None:
    """Copy the weights in `path` into `model`, in the model's own dtype and place.

    `path` is a `.safetensors` file or one of `torch.save`: a state_dict, or a dict that holds one as
    "state_dict" or "model". A prefix `module.` on all names is dropped. Batch norm's
    `num_batches_tracked` may be missing, nothing else.

    Raises ModelError if the file is missing, damaged, or does not fit; the model is then as it was.
    """
    path = Path(path)
    values = _without_prefixes(_unnested(_read(path), path))
    targets = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    differences = _differences(targets, values)
    if differences:
        raise ModelError(f"{path} does not fit {type(model).__name__}: {'; '.join(differences)}.")
    with torch.no_grad():
        for name, value in values.items():
            targets[name].copy_(value)


def _read(path: Path) -> object:
    if not path.is_file():
        found = "is a directory" if path.is_dir() else "does not exist"
        raise ModelError(f"The weight file {path} {found}; give the path of a .safetensors file or of a torch file.")
    _refuse_texts(path)
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"The weight file {path} is damaged, or holds Python objects besides tensors, which are never "
            "loaded. Save the model's state_dict alone: torch.save(model.state_dict(), file)."
        ) from error
    except Exception as error:  # readers of damaged files raise whatever they stumble over
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ModelError(
            f"The weight file {path} cannot be read ({reason}). It is truncated or of another format; fetch it again."
        ) from error


_TEXTS = {
    b"version https://git-lfs": "a pointer of Git LFS, in place of the weights: fetch them with `git lfs pull`",
    b"<!doctype html": "a web page: the address was that of a page about the file; fetch the file itself",
    b"<html": "a web page: the address was that of a page about the file; fetch the file itself",
}
"""How texts begin that downloads leave where weights should be, and what they are."""


def _refuse_texts(path: Path) -> None:
    with open(path, "rb") as file:
        start = file.read(64).lstrip().lower()
    for beginning, what in _TEXTS.items():
        if start.startswith(beginning):
            raise ModelError(f"The weight file {path} is {what}.")


def _unnested(content: object, path: Path) -> dict[str, Tensor]:
    while isinstance(content, Mapping):
        inner = next((content[key] for key in _NESTS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping) or not content:
        raise ModelError(f"{path} holds no weights ({type(content).__name__}); a state_dict is needed.")
    strange = [str(key) for key, value in content.items() if not _is_named_tensor(key, value)]
    if strange:
        raise ModelError(
            f"{path} holds entries that are not tensors ({_first(strange)}); a state_dict, or a dict with "
            f"one as {' or '.join(map(repr, _NESTS))}, is needed."
        )
    return dict(content)


def _is_named_tensor(key: object, value: object) -> bool:
    return isinstance(key, str) and isinstance(value, Tensor)


def _without_prefixes(values: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix = next((p for p in _PREFIXES if all(name.startswith(p) for name in values)), None)
    if prefix is None:
        return values
    return _without_prefixes({name.removeprefix(prefix): value for name, value in values.items()})


def _differences(targets: dict[str, Tensor], values: dict[str, Tensor]) -> list[str]:
    """Sentences about what keeps `values` from being copied to `targets`; none if they fit."""
    found = []
    missing = [name for name in targets if name not in values and name.rpartition(".")[2] != _COUNTER]
    if missing:
        found.append(f"the file lacks {_first(missing)}")
    unexpected = [name for name in values if name not in targets]
    if unexpected:
        found.append(f"the model has no {_first(unexpected)}")
    both = [name for name in targets if name in values]
    wrong = [name for name in both if _kind(targets[name]) != _kind(values[name])]
    classes = _class_counts(targets, values, wrong)
    if classes:
        found.append("the file's classifier has {} classes, this data set has {}".format(*classes))
        wrong = [name for name in wrong if name.rpartition(".")[0] != _classifier(targets)]
    if wrong:
        pairs = [f"{name} ({_kind(values[name])} in the file, {_kind(targets[name])} in the model)" for name in wrong]
        found.append(f"tensors differ: {_first(pairs)}")
    return found


def _kind(value: Tensor) -> str:
    sort = "" if value.is_floating_point() else f"{str(value.dtype).removeprefix('torch.')} "
    return f"{sort}{list(value.shape)}"


def _classifier(targets: dict[str, Tensor]) -> str:
    """The module that holds the last parameter: the classifier, in every family here."""
    return next(reversed(targets)).rpartition(".")[0]


def _class_counts(targets: dict[str, Tensor], values: dict[str, Tensor], wrong: list[str]) -> tuple[int, int] | None:
    """Classes in the file and in the model, if the classifier's rows are all that differs in it."""
    name = f"{_classifier(targets)}.weight" if wrong else None
    if name not in wrong or targets[name].dim() < 2 or targets[name].shape[1:] != values[name].shape[1:]:
        return None
    return len(values[name]), len(targets[name])


def _first(words: list[str]) -> str:
    rest = f" and {len(words) - _SHOWN} more" if len(words) > _SHOWN else ""
    return ", ".join(words[:_SHOWN]) + rest
