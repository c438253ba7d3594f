"""The sums that tell tensors in files: those of zlib, whoever takes them."""

import json
import random
import zlib

import pytest
import torch

from stablekd_fast.files import checksums
from stablekd_fast.files.sealed import check_tensors, sealed_file
from stablekd_fast.kernels._native import core


@pytest.fixture(params=["core", "zlib"])
def crc32(request, monkeypatch):
    if request.param == "zlib":
        monkeypatch.setattr(checksums, "_folded", None)
    elif checksums._folded is None:
        pytest.skip("the core has no crc32 on this processor")
    return checksums.crc32


@pytest.mark.parametrize("start", [0, 1, 7, 15])
def test_the_checksum_crc32_is_that_of_zlib(start, crc32):
    content = random.Random(0).randbytes(2000)
    for size in (*range(300), 1023, 1024, 1040, 1900):
        part = memoryview(content)[start : start + size]
        assert crc32(part) == zlib.crc32(part), size
    for content in (b"\0" * 5000, b"\xff" * 5000, b"123456789"):
        assert crc32(content) == zlib.crc32(content)
    assert crc32(b"123456789") == 0xCBF43926


def test_a_file_of_one_is_read_by_the_other(crc32, monkeypatch):
    tensors = {"a": torch.arange(700_000), "b": torch.ones(3)}
    header = b"".join(sealed_file(tensors, "{}")[1:2])
    monkeypatch.setattr(checksums, "_folded", None if checksums._folded else getattr(core, "crc32", None))
    assert header == b"".join(sealed_file(tensors, "{}")[1:2])
    check_tensors(json.loads(header)["__metadata__"], tensors)
