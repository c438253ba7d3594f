"""A digest of each tensor of a safetensors file, and of what stands beside them, in the file's own metadata.

So a flipped bit, a missing tensor or one of another shape is noticed when the file is read. Files of others, and those
of versions before this one, have no digests and are read without.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor

TEXT, DIGESTS = "stablekd", "stablekd.digests"
FORMAT = 1


def sealed(tensors: Mapping[str, Tensor], text: str) -> dict[str, str]:
    """Return the metadata of a file: `text`, and the digests. The tensors are contiguous and on the CPU."""
    digests = {"format": FORMAT, "text": _digest(text.encode()), "tensors": {n: _told(t) for n, t in tensors.items()}}
    return {TEXT: text, DIGESTS: json.dumps(digests)}


def text_of(metadata: Mapping[str, str] | None) -> str:
    """Return the text that was sealed, `{}` where there is none. Raises ValueError if it is not what was written."""
    metadata = metadata or {}
    digests = _digests(metadata)
    text = metadata.get(TEXT, "{}")
    if digests is not None and digests["text"] != _digest(text.encode()):
        raise ValueError("its metadata are not what was written there")
    return text


def check_tensors(metadata: Mapping[str, str] | None, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError, naming a tensor, unless the tensors are those that were sealed."""
    digests = _digests(metadata or {})
    if digests is None:
        return
    wanted = digests["tensors"]
    if wanted.keys() != tensors.keys():
        name = min(wanted.keys() ^ tensors.keys())
        raise ValueError(f"its tensor {name} {'is missing' if name in wanted else 'was not written there'}")
    for name, tensor in tensors.items():
        if _told(tensor) != wanted[name]:
            raise ValueError(f"its tensor {name} is not what was written there")


def _digests(metadata: Mapping[str, str]) -> dict | None:
    if DIGESTS not in metadata:
        if TEXT in metadata and len(metadata) > 1:  # files of ours hold nothing else
            raise ValueError("its digests are missing")
        return None
    digests = json.loads(metadata[DIGESTS])
    if not isinstance(digests, dict) or digests.get("format") != FORMAT:
        raise ValueError(f"its digests are not of format {FORMAT}, which this version reads")
    if not isinstance(digests.get("tensors"), dict) or "text" not in digests:
        raise ValueError("its digests are damaged")
    return digests


def _told(tensor: Tensor) -> str:
    """What tells a tensor from others: type, shape, bytes."""
    data = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return _digest(f"{tensor.dtype} {list(tensor.shape)}".encode(), data)


def _digest(*parts) -> str:
    made = hashlib.sha256()
    for part in parts:
        made.update(part)
    return made.hexdigest()[:16]
