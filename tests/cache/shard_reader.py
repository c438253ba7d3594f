"""Rows of a shard by the documented format alone: safetensors, and CRC-32C of row number and parts."""

import struct

import numpy as np
import safetensors.numpy


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def read_shard(path) -> dict[int, tuple[dict[str, np.ndarray], bool]]:
    """By row number the parts, in the order of the file, and whether the checksum fits them."""
    content = path.read_bytes()
    assert content[:8] == struct.pack("<Q", 4088), "data begins at byte 4096"
    tensors = safetensors.numpy.load(content)
    offsets = {name: tensors[name] for name in tensors if name not in ("keys", "checksums")}
    order = sorted(offsets, key=lambda name: content.index(f'"{name}"'.encode()))
    found = {}
    for slot, key in enumerate(tensors["keys"].tolist()):
        if key >= 0:
            parts = {name: tensors[name][slot] for name in order}
            data = struct.pack("<q", key) + b"".join(part.tobytes() for part in parts.values())
            found[key] = parts, crc32c(data) == int(tensors["checksums"][slot]) & 0xFFFFFFFF
    return found
