import json

from stablekd_fast.bench.campaigns.bridges import FITTED, main
from stablekd_fast.cli import main as stablekd


def test_every_kind_is_measured(tmp_path):
    small = ["--validation", "32", "--subset", "96", "--batch-size", "32"]
    teacher = ["distill", "--method", "ce", "--student", "resnet8", "--epochs", "1", *small]
    assert stablekd([*teacher, "--out", str(tmp_path / "teacher")]) == 0
    weights = str(tmp_path / "teacher" / "student.safetensors")
    words = ["--data", "digits", "--teacher", "resnet8", "--student", "resnet8", "--teacher-weights", weights, *small]
    main([*words, "--epochs", "1", "--seeds", "1", "--threads", "1", "--out", str(tmp_path / "out")])
    rows = json.loads((tmp_path / "out" / "bridges.json").read_text())["rows"]
    assert [row["bridge"] for row in rows] == list(FITTED)
    for row in rows:
        assert [merge["max_output_difference"] for merge in row["merges"]] == [0.0]
        assert all(gap > 0 for merge in row["merges"] for gap in merge["exposure_gap"].values())
