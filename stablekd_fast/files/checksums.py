"""Checksums: the one of TFRecords, and the one of our own tensors."""

from __future__ import annotations

import zlib

import numpy as np

from stablekd_fast.kernels._native import core


def _table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)  # Castagnoli's polynomial, bits reversed
        table.append(byte)
    return table


_TABLE = _table()


def crc32c(content: bytes) -> int:
    """Return the CRC-32C of some bytes: without the C++ core, a hundred times more slowly."""
    if core is not None and content:
        return core.crc32c(np.frombuffer(content, np.uint8).ctypes.data, len(content)) & 0xFFFFFFFF
    crc = 0xFFFFFFFF
    for byte in content:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


_folded = getattr(core, "crc32", None)  # the core has it where the processor multiplies polynomials


def crc32(content: bytes | memoryview) -> int:
    """Return the CRC-32 of some bytes, as zlib's does, by the C++ core where it is faster."""
    if _folded is None or not len(content):
        return zlib.crc32(content)
    return _folded(np.frombuffer(content, np.uint8).ctypes.data, len(content)) & 0xFFFFFFFF


def masked_crc32c(content: bytes) -> int:
    """Return the CRC-32C of some bytes, turned and shifted as TFRecords store it."""
    crc = crc32c(content)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
