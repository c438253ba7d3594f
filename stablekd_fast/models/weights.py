"""Weights from files into models: all is compared first, then copied, and nothing that a file asks for is run."""

from __future__ import annotations

import difflib
import itertools
import json
import os
import re
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from stablekd_fast.errors import ModelError, first_line
from stablekd_fast.files.pickles import Recorded, load_torch
from stablekd_fast.files.reading import check_format, foreign, open_regular
from stablekd_fast.files.sealed import check_tensors, text_of
from stablekd_fast.models.families import OWN_MODELS

State = dict[str, Tensor]

_NESTS = (
    "state_dict", "model", "model_state_dict", "net", "network", "module", "params", "weights", "student", "model_ema",
    "state_dict_ema", "ema",
)  # fmt: skip
"""Under these names, the first first, training scripts keep the weights in what they save."""
_MAY_LACK = ("num_batches_tracked",)
"""Entries of a state_dict without which a model computes the same."""
_LEFT_BEHIND = ("num_batches_tracked", "total_ops", "total_params", "n_averaged")
"""Entries that counters leave in files: batch norms, profilers and averages."""
_AUXILIARY = re.compile(r"(^|\.)(aux\d*|AuxLogits|aux_\w+|auxiliary\w*)\.")
_SHOWN = 4
_MOST_MODULES, _DEEPEST = 10**5, 100


def load_weights(model: nn.Module, path: str | os.PathLike, taken_off: Sequence[str] = ()) -> None:
    """Copy the weights in `path` into `model`, in the model's own dtype and place.

    `path` is a `.safetensors` file or one of `torch.save`: a state_dict, one nested under `state_dict`, `model`, `net`
    and the like, a whole module, or a checkpoint in which the model's names follow a prefix (`module.`, `_orig_mod.`,
    `model.`, `student.`). Other names of the same layers are known: those of old files of torchvision, of files that
    timm converts, and `linear` for `fc`, `shortcut` for `downsample`. What a file holds beside the model, such as
    settings, optimizers and a loss's own weights, is passed over, and none of its Python objects is made. Auxiliary
    heads that the model lacks are left out with a warning. Batch norm's `num_batches_tracked` may be missing, nothing
    else. `taken_off`: names of the weights of a classifier that the model lacks; the file may hold one, of any number
    of classes, which is passed over.

    Raises ModelError if the file is missing, damaged, or does not fit, with what is missing and what the file may fit;
    the model is then as it was.
    """
    path = Path(path)
    found = _unnested(_read(path), path)
    own = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    targets = own | _as_in_file(taken_off, found)
    values = _fitting(model, targets, found, path)
    if values is None:
        plain = _without_prefix(found)
        values = min(plain, _renamed(targets, plain), key=lambda given: len(_differing(targets, given)))
        differences = "; ".join(_differences(targets, values))
        raise ModelError(f"{path} does not fit {type(model).__name__}: {differences}.{_what_fits(found, targets)}")
    left_out = sorted({name.split(".")[0] for name in values if name not in targets and _AUXILIARY.search(name)})
    if left_out:
        warnings.warn(f"{path}: the auxiliary heads {', '.join(left_out)} are left out.", stacklevel=2)
    with torch.no_grad():
        for name, target in own.items():
            if name in values:
                target.copy_(values[name])


def classes_in(model: nn.Module, path: str | os.PathLike) -> int:
    """Return how many classes the weights in `path` tell apart, which are those of a network like `model` made for
    another number of classes. Raises ModelError if the file is no such one."""
    path = Path(path)
    found = _without_prefix(_unnested(_read(path), path))
    targets = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    last = next(reversed(targets), "")
    for values in (found, _renamed(targets, found), _by_timm(model, found)):
        rows = next((value for name, value in values.items() if name == last or name.endswith(f".{last}")), None)
        if rows is not None and rows.dim():
            return len(rows)
    raise ModelError(
        f"{path} has no {last}, so that it does not tell how many classes {type(model).__name__} was trained on. Give "
        "the weights of that network, or images with labels."
    )


def restore_state(model: nn.Module, state: Mapping[str, Tensor], *, partial: bool = False) -> None:
    """Copy back what `model.state_dict()` gave, or with `partial` some of it.

    The versions of the modules, which files and dicts of tensors do not keep, are the model's own: some modules
    (torchvision's MNASNet) refuse to be loaded without.
    """
    versioned: Any = OrderedDict(state)
    versioned._metadata = getattr(model.state_dict(), "_metadata")  # noqa: B009 - torch's own, untyped
    model.load_state_dict(versioned, strict=not partial)


CARD_FORMAT = 1
"""The version of what an exported student says of itself; files of earlier versions have none, and are alike."""


def card_of(path: str | os.PathLike | None) -> dict[str, Any]:
    """What an exported student says of itself beside its weights: `classes` in order, `mean`, `std`, `image_size`,
    `accuracy`; empty for files of others."""
    if path is None or Path(path).suffix != ".safetensors" or not Path(path).is_file():
        return {}
    try:
        with safetensors.safe_open(path, "pt") as file:
            card = json.loads(text_of(file.metadata()))
    except (safetensors.SafetensorError, ValueError, OSError):
        return {}
    card = card if isinstance(card, dict) else {}
    what, remedy = f"What {path} says of its student", "Export it anew, or give its tensors alone."
    check_format(what, card.get("format", CARD_FORMAT), CARD_FORMAT, ModelError, remedy)
    return card


def _read(path: Path) -> object:
    if not path.is_file():
        found = "is a directory" if path.is_dir() else "does not exist"
        raise ModelError(f"The weight file {path} {found}; give the path of a .safetensors file or of a torch file.")
    _refuse_texts(path)
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
                check_tensors(file.metadata(), tensors)
            return tensors
        if zipfile.is_zipfile(path):
            _refuse_scripts(path)
        return load_torch(str(path))
    except ModelError:
        raise
    except Exception as error:  # readers of damaged files raise whatever they stumble over
        raise ModelError(
            f"The weight file {path} cannot be read ({first_line(error)}). It is truncated or of another format; fetch "
            "it again, or save the model's state_dict alone: torch.save(model.state_dict(), file)."
        ) from error


_TEXTS = {
    b"version https://git-lfs": "a pointer of Git LFS, in place of the weights: fetch them with `git lfs pull`",
    b"<!doctype html": "a web page: the address was that of a page about the file; fetch the file itself",
    b"<html": "a web page: the address was that of a page about the file; fetch the file itself",
}
"""How texts begin that downloads leave where weights should be, and what they are."""


def _refuse_texts(path: Path) -> None:
    with open_regular(path) as file:
        start = file.read(64).lstrip().lower()
    for beginning, what in _TEXTS.items():
        if start.startswith(beginning):
            raise ModelError(f"The weight file {path} is {what}.")


def _refuse_scripts(path: Path) -> None:
    """torch would read a TorchScript archive by other means."""
    with zipfile.ZipFile(path) as archive:
        if any(name.rpartition("/")[2] == "constants.pkl" for name in archive.namelist()):
            raise ModelError(
                f"The weight file {path} is a TorchScript archive, a program. Load it with torch.jit.load and save its "
                "state_dict: torch.save(model.state_dict(), file)."
            )


def _unnested(content: object, path: Path) -> State:
    """The tensors by name that a file's content holds, or one of its parts."""
    with foreign(path, ModelError, "Save the model's state_dict alone: torch.save(model.state_dict(), file)."):
        found = next(_states(content), None)
    if found is None:
        shown = content if isinstance(content, Recorded) else type(content).__name__
        raise ModelError(
            f"{path} holds no weights ({shown}); a state_dict is needed, or a dict with one as "
            f"{', '.join(_NESTS[:4])} or the like."
        )
    return found


def _states(content: object, seen: set[int] | None = None) -> Iterator[State]:
    """State_dicts in a file, the likeliest first; what was seen before is not looked into again."""
    seen = set() if seen is None else seen
    if id(content) in seen:
        return
    seen.add(id(content))
    if isinstance(content, Recorded):
        tensors = dict(_of_module(content, ""))
        if tensors:
            yield tensors
    if not isinstance(content, Mapping):
        return
    for name in _NESTS:
        if name in content:
            yield from _states(content[name], seen)
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if tensors:
        yield tensors


def _of_module(module: Recorded, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """The state_dict of a whole module that was pickled. Raises ValueError if modules hold each other without end."""
    todo, left = [(module, prefix)], _MOST_MODULES
    while todo:
        module, prefix = todo.pop()
        left -= 1
        if not left or prefix.count(".") > _DEEPEST:
            raise ValueError("its modules hold each other without end")
        state = module.state if isinstance(module.state, Mapping) else {}
        for kind in ("_parameters", "_buffers"):
            for name, value in (state.get(kind) or {}).items():
                if isinstance(value, Tensor):
                    yield f"{prefix}{name}", value
        children = (state.get("_modules") or {}).items()
        todo += [(child, f"{prefix}{name}.") for name, child in children if isinstance(child, Recorded)][::-1]


def _as_in_file(names: Sequence[str], found: State) -> State:
    """Return those of the names of a classifier's weights that a file has in some spelling, with what it has there."""
    spellings = {name: {name, *(rename(name) for rename in _OTHER_NAMES)} for name in names}
    ends = {name: tuple(f".{other}" for other in others) for name, others in spellings.items()}
    return {
        name: value
        for name, others in spellings.items()
        for there, value in found.items()
        if there in others or there.endswith(ends[name])
    }


def _fitting(model: nn.Module, targets: State, found: State, path: Path) -> State | None:
    """The file's weights under the model's names; None if they do not fit."""
    parts = {prefix: _below(found, prefix) for prefix in _prefixes(targets, found)}
    fitting = {prefix: part for prefix, part in parts.items() if _fits(targets, part)}
    chosen = next(iter(fitting.values()), None)
    if chosen is not None:
        if not all(_same(chosen, other) for other in fitting.values()):
            raise ModelError(
                f"{path} holds several networks that fit {type(model).__name__}, under "
                f"{', '.join(map(repr, fitting))}. Save the one that is meant by itself."
            )
        return chosen
    plain = _without_prefix(found)
    for rename in (_renamed, lambda targets, values: _by_timm(model, values)):
        for prefix in _prefixes(targets, rename(targets, plain)) or [""]:
            values = _below(rename(targets, plain), prefix)
            if _fits(targets, values):
                return values
    return None


def _same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _prefixes(targets: State, found: State) -> list[str]:
    """What stands before the model's names in a file: before its first weight, as often as that occurs."""
    first = next((name for name in targets if not name.endswith(_MAY_LACK)), "")
    ends = [name for name in found if name == first or name.endswith(f".{first}")]
    return sorted((name.removesuffix(first) for name in ends), key=len)


def _below(found: State, prefix: str) -> State:
    return {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}


def _without_prefix(found: State) -> State:
    """Without the first words of a name that all weights have in common."""
    names = [name.split(".") for name in found if not name.endswith(_LEFT_BEHIND)]
    common = list(itertools.takewhile(lambda words: len(set(words)) == 1, zip(*names))) if len(names) > 1 else []
    return _below(found, "".join(f"{words[0]}." for words in common))


def _fits(targets: State, values: State) -> bool:
    return not _differing(targets, values)


def _differing(targets: State, values: State) -> list[str]:
    """Names that keep `values` from being copied to `targets`."""
    missing = [name for name in targets if name not in values and not name.endswith(_MAY_LACK)]
    wrong = [name for name in targets if name in values and _kind(targets[name]) != _kind(values[name])]
    return [*missing, *_unexpected(targets, values), *wrong]


def _unexpected(targets: State, values: State) -> list[str]:
    return [
        name
        for name in values
        if name not in targets and not name.endswith(_LEFT_BEHIND) and not _AUXILIARY.search(name)
    ]


_OTHER_NAMES: tuple[Callable[[str], str], ...] = (
    lambda name: re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.(\d\.)", r"\1\2", name),  # torchvision's first files
    lambda name: name.replace(".shortcut.", ".downsample."),
    lambda name: name.replace(".downsample.", ".shortcut."),
    lambda name: re.sub(r"^linear\.", "fc.", name),
    lambda name: re.sub(r"^fc\.", "linear.", name),
)


def _renamed(targets: State, values: State) -> State:
    """Values whose name the model does not have, under another name of the same layer that it has."""

    def name_of(name: str) -> str:
        others = (name, *(rename(name) for rename in _OTHER_NAMES))
        return next((other for other in others if other in targets), name)

    return {name_of(name): value for name, value in values.items()}


def _by_timm(model: nn.Module, values: State) -> State:
    """As timm's own converter for a model's family makes them, for files that the models' authors published."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None or not type(model).__module__.startswith("timm."):
        return values
    try:
        return {name: value for name, value in convert(dict(values), model).items() if isinstance(value, Tensor)}
    except Exception:  # it expects its own files, and stumbles over others
        return values


def _what_fits(found: State, targets: State) -> str:
    """Which of the models by name the weights are those of, as far as names and shapes tell."""
    values, classes = _without_prefix(found), len(next(reversed(targets.values())))
    fitting = []
    for name, make in OWN_MODELS.items():
        with torch.device("meta"):
            other = make(classes, None).state_dict()
        if _fits(other, values) or _fits(other, _renamed(other, values)):
            fitting.append(name)
    return f" By their names and shapes these are weights of {' or '.join(fitting)}." if fitting else ""


def _differences(targets: State, values: State) -> list[str]:
    """Sentences about what keeps `values` from being copied to `targets`."""
    found = []
    missing = [name for name in targets if name not in values and not name.endswith(_MAY_LACK)]
    unexpected = _unexpected(targets, values)
    if missing:
        near = difflib.get_close_matches(missing[0], unexpected, 1, 0.6)
        found.append(f"the file lacks {_first(missing)}{f' (it has {near[0]})' if near else ''}")
    if unexpected:
        found.append(f"the model has no {_first(unexpected)}")
    wrong = [name for name in targets if name in values and _kind(targets[name]) != _kind(values[name])]
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


def _classifier(targets: State) -> str:
    """The module that holds the last parameter: the classifier, in every family here."""
    return next(reversed(targets)).rpartition(".")[0]


def _class_counts(targets: State, values: State, wrong: list[str]) -> tuple[int, int] | None:
    """Classes in the file and in the model, if the classifier's rows are all that differs in it."""
    name = f"{_classifier(targets)}.weight" if wrong else None
    if name not in wrong or targets[name].dim() < 2 or targets[name].shape[1:] != values[name].shape[1:]:
        return None
    return len(values[name]), len(targets[name])


def _first(words: list[str]) -> str:
    rest = f" and {len(words) - _SHOWN} more" if len(words) > _SHOWN else ""
    return ", ".join(words[:_SHOWN]) + rest
