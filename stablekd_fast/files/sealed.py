"""Safetensors files with a digest of each tensor, and of what stands beside them, in their own metadata.

So a flipped bit, a missing tensor or one of another shape is noticed when the file is read. Files of others, and those
of versions before digests, have none and are read without. All of it is one entry of the metadata: the format
does not keep several in order, and the same run shall write the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping

import safetensors.torch
import torch
from torch import Tensor

from stablekd_fast.files.checksums import crc32

KEY, MARK, FORMAT = "stablekd", "sealed ", "2"
_BLOCK = 1 << 20


def sealed_file(tensors: Mapping[str, Tensor], text: str) -> list[bytes | memoryview]:
    """Return the bytes of a file in pieces, of which the tensors' own are not copied: a header with the digests and
    `text`, and what the tensors hold. They are contiguous, on the CPU, and share no memory.
    """
    content = json.dumps(_all_told(tensors, FORMAT)) + "\n" + text
    seal = {KEY: f"{MARK}{FORMAT} {_digest(content.encode())} {content}"}
    # safetensors knows the names of types and the order of tensors; given their contents, it would copy them.
    empty = safetensors.torch.save({name: tensor.new_empty(0) for name, tensor in tensors.items()}, seal)
    header, data, end = json.loads(empty[8:]), [], 0
    for name, entry in header.items():
        if name != "__metadata__":
            data.append(as_bytes(tensors[name]))
            entry["shape"], entry["data_offsets"] = list(tensors[name].shape), [end, end + len(data[-1])]
            end += len(data[-1])
    head = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)
    return [len(head).to_bytes(8, "little"), head, *data]


def text_of(metadata: Mapping[str, str] | None) -> str:
    """Return the text that was sealed, `{}` where there is none. Raises ValueError if it is not what was written."""
    return _opened(metadata or {})[2]


def check_tensors(metadata: Mapping[str, str] | None, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError, naming a tensor, unless the tensors are those that were sealed."""
    form, wanted, _ = _opened(metadata or {})
    if wanted is None:
        return
    if wanted.keys() != tensors.keys():
        name = min(wanted.keys() ^ tensors.keys())
        raise ValueError(f"its tensor {name} {'is missing' if name in wanted else 'was not written there'}")
    for name, digest in _all_told(tensors, form).items():
        if digest != wanted[name]:
            raise ValueError(f"its tensor {name} is not what was written there")


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor, in place if it is contiguous."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def _opened(metadata: Mapping[str, str]) -> tuple[str, dict[str, str] | None, str]:
    """The format of the digests, the digest of each tensor (None in a file without), and the text."""
    value = next((value for value in metadata.values() if value.startswith(MARK)), None)  # whatever its name became
    if value is None:
        return FORMAT, None, metadata.get(KEY, "{}")
    form, digest, content = [*value.removeprefix(MARK).split(" ", 2), "", ""][:3]
    if form not in _TOLD:
        raise ValueError(f"its digests are of format {form:.20}; this version reads {' and '.join(_TOLD)}")
    if KEY not in metadata or digest != _digest(content.encode()):
        raise ValueError("its metadata are not what was written there")
    digests, _, text = content.partition("\n")
    return form, json.loads(digests), text


def _all_told(tensors: Mapping[str, Tensor], form: str) -> dict[str, str]:
    return {name: _TOLD[form](tensor) for name, tensor in tensors.items()}


def _told_by_sums(tensor: Tensor) -> str:
    """What tells a tensor from others: type, shape, and the CRC-32 of each MiB."""
    data = as_bytes(tensor)
    sums = [crc32(data[start : start + _BLOCK]) for start in range(0, len(data), _BLOCK)]
    return _digest(f"{tensor.dtype} {list(tensor.shape)} {sums}".encode())


def _told_by_hash(tensor: Tensor) -> str:
    """The same by all bytes, which takes up to ten times as long."""
    return _digest(f"{tensor.dtype} {list(tensor.shape)}".encode(), as_bytes(tensor))


_TOLD: dict[str, Callable[[Tensor], str]] = {"1": _told_by_hash, FORMAT: _told_by_sums}
"""How each format of digests tells a tensor."""


def _digest(*parts: bytes | memoryview) -> str:
    made = hashlib.sha256()
    for part in parts:
        made.update(part)
    return made.hexdigest()[:16]
