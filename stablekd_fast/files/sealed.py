"""A digest of each tensor of a safetensors file, and of what stands beside them, in the file's own metadata.

So a flipped bit, a missing tensor or one of another shape is noticed when the file is read. Files of others, and those
of versions before this one, have no digests and are read without. All of it is one entry of the metadata: the format
does not keep several in order, and the same run shall write the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

KEY, MARK, FORMAT = "stablekd", "sealed ", "1"
_THREADS = 4


def sealed(tensors: Mapping[str, Tensor], text: str) -> dict[str, str]:
    """Return the metadata of a file: the digests in one line, and `text`. The tensors are contiguous and on the CPU."""
    content = json.dumps(_all_told(tensors)) + "\n" + text
    return {KEY: f"{MARK}{FORMAT} {_digest(content.encode())} {content}"}


def text_of(metadata: Mapping[str, str] | None) -> str:
    """Return the text that was sealed, `{}` where there is none. Raises ValueError if it is not what was written."""
    return _opened(metadata or {})[1]


def check_tensors(metadata: Mapping[str, str] | None, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError, naming a tensor, unless the tensors are those that were sealed."""
    wanted = _opened(metadata or {})[0]
    if wanted is None:
        return
    if wanted.keys() != tensors.keys():
        name = min(wanted.keys() ^ tensors.keys())
        raise ValueError(f"its tensor {name} {'is missing' if name in wanted else 'was not written there'}")
    for name, digest in _all_told(tensors).items():
        if digest != wanted[name]:
            raise ValueError(f"its tensor {name} is not what was written there")


def _opened(metadata: Mapping[str, str]) -> tuple[dict[str, str] | None, str]:
    """The digest of each tensor, None in a file without, and the text."""
    value = next((value for value in metadata.values() if value.startswith(MARK)), None)  # whatever its name became
    if value is None:
        return None, metadata.get(KEY, "{}")
    form, digest, content = [*value.removeprefix(MARK).split(" ", 2), "", ""][:3]
    if form != FORMAT:
        raise ValueError(f"its digests are of format {form:.20}; this version reads {FORMAT}")
    if KEY not in metadata or digest != _digest(content.encode()):
        raise ValueError("its metadata are not what was written there")
    digests, _, text = content.partition("\n")
    return json.loads(digests), text


def _all_told(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    with ThreadPoolExecutor(_THREADS) as threads:  # hashing lets go of the interpreter
        return dict(zip(tensors, threads.map(_told, tensors.values())))


def _told(tensor: Tensor) -> str:
    """What tells a tensor from others: type, shape, bytes."""
    data = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return _digest(f"{tensor.dtype} {list(tensor.shape)}".encode(), data)


def _digest(*parts) -> str:
    made = hashlib.sha256()
    for part in parts:
        made.update(part)
    return made.hexdigest()[:16]
