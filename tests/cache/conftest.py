import os
import subprocess

import pytest
import torch

from stablekd_fast.cache.manifest import Manifest
from stablekd_fast.cache.shard import Part
from stablekd_fast.cache.store import RowStore

PARTS = (Part("rows", torch.int8, (3, 5, 5)), Part("scales", torch.float32, (3,)))
SAMPLES = 100


def make_rows(rows: torch.Tensor) -> list[torch.Tensor]:
    """What is stored under these numbers: a function of the number alone."""
    codes = (rows[:, None] * 7 + torch.arange(75)).remainder(255).sub(127).to(torch.int8).view(-1, 3, 5, 5)
    scales = rows[:, None].float() + torch.arange(3) / 4
    return [codes.contiguous(), scales.contiguous()]


@pytest.fixture(name="make_rows")
def make_rows_fixture():
    return make_rows


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("this container may not mount file systems")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.fixture
def wanted():
    return Manifest(PARTS, SAMPLES, {"teacher": "t1", "data": {"name": "d", "images": 100}})


@pytest.fixture
def filled(tmp_path, wanted, monkeypatch):
    """A column of 100 rows in four finished shards."""
    monkeypatch.setattr("stablekd_fast.cache.store._SMALLEST_SHARD", 25 * wanted.row_bytes)
    folder = tmp_path / "cache" / "layer1.int8"
    with RowStore(folder, wanted, write=True) as store:
        order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(0))
        for rows in order.split(16):
            store.put(rows, make_rows(rows))
    return folder
