"""The benches of the cache on small cases: they measure what they say, and show no speed for a wrong result."""

import dataclasses
import json

import pytest
import torch

from stablekd_fast.bench.core import WrongResult, check, measure
from stablekd_fast.bench.runs.cache import Rows, disk_rows, memory_row, page_cache_cases
from stablekd_fast.bench.runs.plan import run_plan
from stablekd_fast.bench.runs.teacher import Pair, Rerun, feeding_case
from stablekd_fast.cli import main
from stablekd_fast.data import open_dataset


@pytest.fixture(scope="module")
def digits():
    return open_dataset("digits")


def test_rows_from_main_memory_are_checked_and_timed(tmp_path):
    for case in page_cache_cases(tmp_path, 8 << 20):
        rows = {row["contender"]: row for row in measure(case, 2)}
        assert rows["memcpy"]["ratio"] == 1.0 and rows["stablekd"]["median_seconds"] > 0
        assert rows["stablekd"]["bytes"] >= 128 * 4096
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_wrong_row_shows_no_speed(tmp_path):
    case = next(page_cache_cases(tmp_path, 1 << 20))
    (stablekd,) = [contender for contender in case.contenders if contender.name == "stablekd"]
    rows = stablekd.call.__self__
    rows.values[:, 0] += 1  # what should have been stored
    with pytest.raises(WrongResult, match="stablekd"):
        check(dataclasses.replace(case, contenders=[stablekd]))


def test_rows_from_disk_and_memory_over_an_epoch(tmp_path):
    direct, ours = disk_rows(tmp_path, 8 << 20, 2)
    assert (direct["contender"], ours["contender"]) == ("direct reads", "stablekd") and ours["ratio"] > 0
    memory = memory_row(tmp_path, 16 << 20)
    assert memory["bytes_read"] == 16 << 20 and memory["resident_growth"] < 8 << 20


def test_wrong_bytes_from_disk_show_no_speed(tmp_path, monkeypatch):
    monkeypatch.setattr(Rows, "gather", lambda self: self.store.gather(self.next(), self.out)[0] + 1)
    with pytest.raises(WrongResult, match="stablekd read other bytes"):
        disk_rows(tmp_path, 8 << 20, 2)


def test_every_way_to_feed_the_blocks_is_checked(tmp_path, digits):
    case = feeding_case(Pair("resnet14", "resnet8", 8, 16, batches=2), digits, tmp_path)
    rows = {row["contender"]: row for row in measure(case, 2)}
    assert set(rows) == {"prefix run again", "relay", "cache", "cache, bf16", "cache, int8", "students alone"}
    arm = case.contenders[2].call.__self__
    places = arm.teacher.columns[0].rows.tables.places
    stored = (places >= 0).nonzero().flatten()
    places[stored] = places[stored.roll(1)]  # rows of other samples, which were all checked before
    with pytest.raises(WrongResult, match="cache is wrong"):
        check(case)


def test_running_the_prefix_again_runs_it_once_per_block(tmp_path, digits):
    case = feeding_case(Pair("resnet14", "resnet8", 8, 16, batches=2), digits, tmp_path)
    arm, ran = case.contenders[0].call.__self__, []
    assert isinstance(arm.teacher, Rerun)
    for k, block in enumerate(arm.paired.teacher_blocks):
        block.register_forward_hook(lambda *_, k=k: ran.append(k))
    arm.load()
    assert ran == [0, 0, 1, 0, 1, 2, 0, 1, 2, 3]


def test_plans_are_compared_with_what_was_predicted(tmp_path, monkeypatch):
    monkeypatch.setattr("stablekd_fast.bench.runs.plan.TEACHER", "resnet14")
    monkeypatch.setattr("stablekd_fast.bench.runs.plan.STUDENT", "resnet8")
    measured = run_plan(tmp_path, "digits", lambda rows: None, budgets=("0", "10MB"), images=256)
    none, some = measured.rows
    assert none["kept"] == "nothing" and none["ratio"] == 1.0 and some["baseline"] == none["contender"] == "budget 0"
    runs = measured.tables["plans and runs"]
    assert all(run["predicted_seconds"] > 0 and run["measured_seconds"] > 0 for run in runs)
    assert [run["measured_seconds"] for run in runs] == [none["median_seconds"], some["median_seconds"]]
    assert list(tmp_path.iterdir()) == []


def test_the_commands_write_their_files(tmp_path, capsys):
    assert main(["bench", "teacher", "--directory", str(tmp_path)]) == 2
    assert "No images were given" in capsys.readouterr().err
    out = tmp_path / "cache.json"
    assert main(["bench", "cache", "--quick", "--rounds", "1", "--directory", str(tmp_path), "--json", str(out)]) == 0
    document = json.loads(out.read_text())
    assert {row["contender"] for row in document["rows"]} >= {
        "memcpy",
        "stablekd",
        "direct reads",
        "one .pt per sample",
    }
    assert (
        document["tables"]["memory"][0]["ram_budget"]
        and document["machine"]
        and document["versions"]["torch"] == torch.__version__
    )
    assert isinstance(Rows.make(tmp_path / "x", 4096, 1 << 20).gather(), torch.Tensor)
