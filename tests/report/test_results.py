import importlib.metadata
import json
import math
import os
import sys

import pytest
import torch
from rich.console import Console

from stablekd_fast.errors import StableKDError, TrainingError
from stablekd_fast.report import (
    machine,
    read_results,
    summarise,
    summary_rows,
    summary_table,
    summary_text,
    versions,
    write_results,
)
from stablekd_fast.report.machine import PACKAGES
from stablekd_fast.report.table import duration


def run(method, seed, accuracy, **other):
    common = {"epochs": 8.0, "steps": 624, "images_per_second": 800.0, "wall_seconds": 100.0}
    return {"method": method, "seed": seed, "accuracy": accuracy, **common, **other}


RUNS = [run("kd", 0, 0.60), run("stablekd", 0, 0.70, wall_seconds=90.0), run("kd", 1, 0.64), run("kd", 2, 0.65)]


def test_results_come_back_with_machine_and_versions(tmp_path):
    path = tmp_path / "new" / "results.json"
    write_results(path, [run("kd", 0, torch.tensor(0.5), top5=math.nan)], teacher={"accuracy": 0.83})
    document = read_results(path)
    assert document["runs"] == [run("kd", 0, 0.5, top5=None)]
    assert document["teacher"] == {"accuracy": 0.83}
    assert document["machine"]["cores"] == os.cpu_count()
    assert document["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("failing", ["os.fsync", "os.replace"])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, failing):
    path = tmp_path / "results.json"
    write_results(path, RUNS)
    before = path.read_bytes()

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(failing, refuse)
    with pytest.raises(TrainingError, match="No space left"):
        write_results(path, RUNS[:1])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_without_a_required_key_is_refused_before_anything_is_written(tmp_path):
    bad = run("kd", 1, 0.6)
    del bad["steps"], bad["seed"]
    with pytest.raises(StableKDError, match="Run 1 lacks seed, steps; it has method"):
        write_results(tmp_path / "results.json", [RUNS[0], bad])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("accuracy", [63.2, -0.1, math.nan])
def test_an_accuracy_that_is_no_share_is_refused(tmp_path, accuracy):
    with pytest.raises(StableKDError, match=r"kd, seed 0.*between 0 and 1"):
        write_results(tmp_path / "results.json", [run("kd", 0, accuracy)])


@pytest.mark.parametrize("content", [None, "", "{}", "[]", '{"runs": [{"method": "kd"}]}', "\x00"])
def test_what_is_no_results_file_is_refused(tmp_path, content):
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(StableKDError, match="results.json|lacks seed"):
        read_results(path)


def test_summary_is_what_a_hand_computes():
    kd, stablekd = summarise(RUNS)
    assert (kd["method"], kd["count"], kd["min"], kd["max"]) == ("kd", 3, 0.60, 0.65)
    assert kd["mean"] == pytest.approx(0.63, abs=1e-15)  # (60 + 64 + 65) / 3
    assert kd["std"] == pytest.approx(math.sqrt(0.0007), abs=1e-15)  # (0.03² + 0.01² + 0.02²) / 2 = 0.0007
    assert (stablekd["count"], stablekd["mean"], stablekd["std"], stablekd["wall_seconds"]) == (1, 0.7, None, 90.0)
    assert summarise([]) == []


def test_differences_carry_their_sign():
    rows = summary_rows(RUNS, baseline="kd")
    assert [row["vs kd"] for row in rows] == ["", "+7.00"]
    assert [row["vs stablekd"] for row in summary_rows(RUNS, baseline="stablekd")] == ["-7.00", ""]
    assert [row["accuracy %"] for row in rows] == ["63.00 ± 2.65", "70.00"]
    assert "vs kd" not in summary_rows(RUNS)[0]


def test_an_unknown_baseline_is_refused():
    with pytest.raises(StableKDError, match="'ce' is not among the methods: kd, stablekd"):
        summary_rows(RUNS, baseline="ce")


def test_tables_show_every_cell():
    hostile = [*RUNS, run("[bold]a|b", 0, 0.5)]
    console = Console(width=80, record=True, file=open(os.devnull, "w"))
    console.print(summary_table(hostile, baseline="kd"))
    drawn, plain = console.export_text(), summary_text(hostile, "kd")
    markdown = summary_text(hostile, "kd", markdown=True)
    for row in summary_rows(hostile, "kd"):
        for cell in row.values():
            assert cell in drawn and cell in plain and cell.replace("|", r"\|") in markdown
    lines = markdown.splitlines()
    assert len({line.replace(r"\|", "").count("|") for line in lines}) == 1 and set(lines[1]) <= set("|-: ")


def test_columns_are_named_and_numbers_stand_to_the_right():
    columns = summary_table(RUNS).columns
    assert [column.header.plain for column in columns] == list(summary_rows(RUNS)[0])
    assert [column.justify for column in columns] == ["left"] + ["right"] * (len(columns) - 1)


def test_a_package_that_is_missing_hides_no_other(monkeypatch):
    def version(name):
        if name == PACKAGES[0]:
            raise importlib.metadata.PackageNotFoundError(name)
        return f"{name} 1"

    monkeypatch.setattr(sys.modules["stablekd_fast.report.machine"], "version", version)
    found = versions()
    assert PACKAGES[0] not in found and all(found[name] == f"{name} 1" for name in PACKAGES[1:])


def test_no_runs_make_an_empty_table():
    assert summary_text([]) == "" and summary_table([]).row_count == 0


@pytest.mark.parametrize(
    "seconds, text", [(4.25, "4.2 s"), (59.99, "1 min 00 s"), (185, "3 min 05 s"), (7799, "2 h 10 min")]
)
def test_durations_are_readable(seconds, text):
    assert duration(seconds) == text


def test_machine_and_versions_are_plain_json():
    for facts in (machine(), versions()):
        assert json.loads(json.dumps(facts)) == facts
    assert machine()["memory_bytes"] > 2**28 and machine()["torch_threads"] == torch.get_num_threads()
    assert {"python", "torch", "torchvision", "numpy", "stablekd_fast"} <= versions().keys()
    assert all(isinstance(value, str) for value in versions().values())


@pytest.mark.parametrize("run", [333333, None, [1], "run", {"accuracy": "high"}])
def test_a_run_that_is_none_is_refused(tmp_path, run):
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"runs": [run]}))
    with pytest.raises(StableKDError, match="Run 0 is .*; a run in results.json has names"):
        read_results(path)
