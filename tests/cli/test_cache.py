"""`stablekd cache` and `stablekd plan` as a person uses them, on the embedded digits."""

import json
from pathlib import Path

import pytest
import torch

from stablekd_fast import models
from stablekd_fast.cli import main

NAMES = ("layer1", "layer2", "layer3", "logits")


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[str]:
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("cache")
    torch.manual_seed(0)
    save_file(models.build("resnet20", 10).state_dict(), folder / "teacher.safetensors")
    return [
        "--teacher", "resnet20", "--teacher-weights", str(folder / "teacher.safetensors"), "--student", "resnet20",
        "--subset", "96", "--validation", "0", "--epochs", "3", "--views", "1", "--batch-size", "32",
        "--bn-images", "32", "--precision", "fp32",
        "--cache.plan", "all", "--cache.directory", str(folder / "rows"),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def rows(arguments) -> Path:
    """Built by the command, before any run."""
    assert main(["cache", "build", *arguments]) == 0
    return Path(arguments[-1])


def test_a_built_cache_holds_every_image_and_a_run_needs_no_teacher(rows, arguments, tmp_path, capsys):
    assert sorted(path.name for path in rows.iterdir() if path.is_dir()) == [f"{name}.fp32" for name in NAMES]
    before = {path: path.stat().st_mtime_ns for path in rows.rglob("*.safetensors")}
    assert main(["distill", *arguments, "--out", str(tmp_path / "run")]) == 0
    assert {path: path.stat().st_mtime_ns for path in rows.rglob("*.safetensors")} == before


def test_info_lists_columns_and_what_they_were_made_from(rows, capsys):
    assert main(["cache", "info", str(rows)]) == 0
    shown = capsys.readouterr().out
    assert "96" in shown and all(name in shown for name in ("layer1", "view seed", "batch size"))


def test_verify_names_a_damaged_row(rows, capsys):
    assert main(["cache", "verify", str(rows)]) == 0
    assert "96" in capsys.readouterr().out
    (path,) = (rows / "layer2.fp32").glob("shard-*")
    whole = path.read_bytes()
    path.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    assert main(["cache", "verify", str(rows)]) == 2
    shown = capsys.readouterr()
    assert "layer1.fp32" in shown.out and "Row" in shown.err and "layer2.fp32/shard-00000" in shown.err
    path.write_bytes(whole)


def test_gc_deletes_what_is_named_and_nothing_else(rows, arguments, capsys):
    assert main(["cache", "gc", str(rows)]) == 2
    assert "Nothing was named" in capsys.readouterr().err
    assert main(["cache", "gc", str(rows), "--columns", "layer3.fp32,layer9.fp32"]) == 2
    refused = capsys.readouterr().err
    assert "no column 'layer9.fp32'" in refused and "the nearest is 'layer" in refused
    assert (rows / "layer3.fp32").exists()
    assert main(["cache", "gc", str(rows), "--columns", "layer3.fp32"]) == 0
    assert not (rows / "layer3.fp32").exists() and (rows / "layer2.fp32").exists()
    (rows / "layer1.fp32" / ".shard-00007.safetensors").write_bytes(b"half")
    assert main(["cache", "gc", str(rows), "--half-filled"]) == 0
    assert "deleted layer1.fp32/.shard-00007.safetensors" in capsys.readouterr().out
    assert main(["cache", "build", *arguments]) == 0
    assert main(["cache", "info", str(rows / "nothing")]) == 2
    assert "There is no cache" in capsys.readouterr().err


PLAN = ["plan", "--teacher", "resnet56", "--student", "resnet20", "--image-size", "32", "--classes", "10"]


def test_a_plan_for_another_device_shows_its_arithmetic_and_says_that_it_is_predicted(capsys):
    words = ["--budget-disk", "200GB", "--device-profile", "h100", "--images", "50000", "--views", "1"]
    assert main([*PLAN, *words]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "predicted, not measured" in shown and "NVIDIA H100 data sheet" in shown.replace("│", "")
    assert all(word in shown for word in ("layer1", "relay alone", "this plan", "live ms", "kept ms", "images/s"))


def test_a_plan_for_this_machine_is_measured(capsys):
    words = ["--budget-disk", "2GB", "--images", "2000", "--batch-size", "32", "--codecs", "[fp32, int8]"]
    assert main([*PLAN, *words]) == 0
    assert "measured on this machine" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("device", ["this-machine", "a100"])
def test_a_plan_for_ranks_shows_how_evenly_they_could_divide_blocks(capsys, device):
    assert main([*PLAN, "--batch-size", "8", "--ranks", "3", "--device-profile", device]) == 0
    shown = capsys.readouterr().out
    table = shown[shown.index("Blocks apart") :].split("└")[0]
    rows = [[float(cell) for cell in line.split("│")[1:-1]] for line in table.splitlines() if line.startswith("│")]
    assert [row[0] for row in rows] == list(range(3, 12)), "of 12 blocks one would have nothing to train"
    for _, alone, busiest, efficiency in rows:
        assert 1 / 3 <= efficiency <= 1.001 and efficiency == pytest.approx(alone / (3 * busiest), rel=2e-3)
    predicted = "predicted, not measured" in " ".join(shown.split())
    assert predicted == ("images/s" in shown) == (device == "a100")


def test_bad_plans_are_named(capsys, tmp_path):
    assert main([*PLAN, "--budget-disk", "1GB", "--device-profile", "a1000"]) == 2
    assert "no device profile 'a1000'; the nearest is 'a100'" in capsys.readouterr().err
    (tmp_path / "mine.json").write_text(json.dumps({"name": "mine"}))
    assert main([*PLAN, "--budget-disk", "1GB", "--device-profile", str(tmp_path / "mine.json")]) == 2
    assert "is no device profile" in capsys.readouterr().err
    assert main([*PLAN, "--budget-disk", "many"]) == 2
    assert "budget_disk='many' was given" in capsys.readouterr().err
