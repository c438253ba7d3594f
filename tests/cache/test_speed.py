"""What the cost model takes from the machine, where it can be known."""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from stablekd_fast.cache import speed
from stablekd_fast.cache.speed import CodecCost


def test_a_disk_s_budget_is_the_lesser_of_what_is_given_and_what_is_free(tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "shard-00000.safetensors").write_bytes(bytes(500))
    (tmp_path / "other").write_bytes(bytes(70))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10_000, 8_000, 2_000))
    assert speed._disk_budget(tmp_path, None) == pytest.approx(0.95 * 2_000 + 500), "stored rows may stay"
    assert speed._disk_budget(tmp_path, 1_000) == 1_000
    assert speed._disk_budget(tmp_path, 10**9) == pytest.approx(2_400)


def test_memory_that_holds_files_counts_as_free(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda self: "MemTotal:  9 kB\nCached:       1000 kB\nSwapCached: 3 kB\n")
    assert speed._file_pages() == 1_024_000
    monkeypatch.setattr(speed.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_AVPHYS_PAGES": 10}.get)
    assert speed.free_memory() == 40_960 + 1_024_000
    monkeypatch.setattr(Path, "read_text", lambda self: "nothing\n")
    assert speed.free_memory() == 40_960


def test_nothing_is_stored_and_all_is_exact_unless_said():
    cost = CodecCost(1, 2.0, 3.0)
    assert (cost.stored, cost.exact) == (0.0, True)
