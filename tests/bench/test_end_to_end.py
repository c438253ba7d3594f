"""`bench end-to-end` in small: methods race to one accuracy, every way to run their steps is checked."""

import dataclasses
import json

import pytest
import torch

from stablekd_fast.bench.campaigns.campaign import Task
from stablekd_fast.bench.campaigns.end_to_end import EPOCHS, Goal, Race
from stablekd_fast.bench.core import WrongResult, check
from stablekd_fast.bench.runs.stages import CACHE, LIVE, PLAIN, StageBench
from stablekd_fast.cli import main
from stablekd_fast.data import open_dataset
from stablekd_fast.errors import ConfigError
from stablekd_fast.report import read_events

DECOMPOSED, MERGED = [[0], [1], [2], [3]], [[0, 1, 2, 3]]
SMALL = ["--validation", "32", "--subset", "128", "--batch_size", "32"]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return StageBench("resnet14", "resnet8", open_dataset("digits"), "fp32", tmp_path_factory.mktemp("rows"))


@pytest.mark.parametrize("method, groups", [
    ("ce", [[0]]), ("kd", MERGED), ("kd+features", MERGED), ("blocks", DECOMPOSED), ("stablekd", DECOMPOSED),
    ("stablekd", MERGED),
])  # fmt: skip
def test_every_way_to_run_a_stage_gives_the_losses_of_float64(bench, method, groups):
    case = bench.case(method, groups, 16)
    check(case)
    ways = {contender.name for contender in case.contenders}
    assert {PLAIN, LIVE} <= ways and (CACHE in ways) == (method != "ce")


def test_a_stage_that_computes_something_else_shows_no_speed(bench):
    case = bench.case("stablekd", DECOMPOSED, 16)
    (engine,) = [one for one in case.contenders if one.name == CACHE]
    with torch.no_grad():
        engine.call.__self__.paired.student_blocks[1].state_dict()["layer2.0.conv1.weight"][0] += 1
    with pytest.raises(WrongResult, match=CACHE):
        check(case)


@pytest.fixture(scope="module")
def race(tmp_path_factory):
    folder = tmp_path_factory.mktemp("race")
    teacher = [
        "distill",
        "--method",
        "ce",
        "--student",
        "resnet8",
        "--epochs",
        "2",
        *SMALL,
        "--out",
        str(folder / "teacher"),
    ]
    assert main(teacher) == 0
    weights = str(folder / "teacher" / "student.safetensors")
    words = ["bench", "end-to-end", "--data", "digits", "--teacher", "resnet8", "--teacher_weights", weights]
    words += [
        "--student",
        "resnet8",
        *SMALL,
        "--goal",
        "kd:2",
        "--budgets",
        "1,9",
        "--methods",
        "ce,stablekd",
        "--seeds",
        "2",
    ]
    words += ["--rounds", "1", "--out", str(folder / "out"), "--json", str(folder / "race.json")]
    assert main(words) == 0
    return folder


def epochs_of(race):
    return {row["method"]: row for row in json.loads((race / "race.json").read_text())["tables"][EPOCHS]}


def test_the_smallest_budget_that_reaches_the_target_counts(race):
    epochs = epochs_of(race)
    assert list(epochs) == ["ce", "stablekd", "kd"]
    assert epochs["kd"]["epochs"] == 2 and epochs["kd"]["accuracy"] == pytest.approx(epochs["kd"]["target"])
    for row in epochs.values():
        assert (row["reached"] == "yes") == (row["accuracy"] >= row["target"])
        assert row["epochs"] in (1, 2) and row["steps"] == 4 * row["epochs"]
        assert row["epochs"] == 2 or row["reached"] == "yes", (
            "no smaller budget was enough, and none beyond the goal's is tried"
        )


def test_wall_time_is_steps_times_the_seconds_of_a_step(race):
    found = json.loads((race / "race.json").read_text())
    seconds = {(row["case"].split(",")[0], row["contender"]): row["median_seconds"] for row in found["rows"]}
    walls = {row["contender"]: row for row in found["rows"] if row["case"].startswith("wall seconds")}
    assert walls[f"kd, {PLAIN}"]["median_seconds"] == pytest.approx(8 * seconds["kd", PLAIN])
    assert walls[f"kd, {PLAIN}"]["ratio"] == 1.0 and walls[f"kd, {CACHE}"]["role"] == "ours"
    assert f"ce, {CACHE}" not in walls
    assert walls[f"kd, {LIVE}"]["ratio"] == pytest.approx(
        8 * seconds["kd", PLAIN] / walls[f"kd, {LIVE}"]["median_seconds"]
    )
    reached = {method for method, row in epochs_of(race).items() if row["reached"] == "yes"}
    assert {name.split(",")[0] for name in walls} == reached, "no time is shown for an accuracy that was not reached"


def test_finished_runs_are_read_instead_of_done_again(race):
    runs = sorted((race / "out" / "runs").iterdir())
    assert len(runs) in (6, 8, 10) and all((run / "results.json").exists() for run in runs)
    before = {path: path.stat().st_mtime_ns for run in runs for path in run.iterdir() if path.name != "claim"}
    config = read_events(runs[0])[0]["config"]
    task = Task(**{field.name: config[field.name] for field in dataclasses.fields(Task) if field.name in config})
    again = Race(task, {}, 2, race / "out").train("kd", 2.0)
    assert 100 * again.accuracy == pytest.approx(epochs_of(race)["kd"]["target"])
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize("wrong", [["--methods", "stabelkd"], ["--budgets", "2,many"], ["--precision", "auto"]])
def test_what_does_not_exist_is_refused_before_anything_is_trained(tmp_path, capsys, wrong):
    words = ["--data", "digits", "--teacher", "resnet20", "--teacher_weights", "none", "--student", "resnet20"]
    assert main(["bench", "end-to-end", *words, *wrong, "--out", str(tmp_path / "out")]) == 2
    assert wrong[1] in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["kd", "kd:", "kd:0", "kd:many", "knowledge:4"])
def test_a_goal_needs_a_method_and_epochs(text):
    with pytest.raises(ConfigError, match="METHOD:EPOCHS"):
        Goal.parse(text)
