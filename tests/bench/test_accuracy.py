import json

import pytest
import torch

from stablekd_fast.bench.campaigns.accuracy import CANDIDATES, main
from stablekd_fast.cli import main as stablekd
from stablekd_fast.engine.checkpoint import load_tensors
from stablekd_fast.errors import CheckpointError
from stablekd_fast.report import read_events


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    """A whole campaign in small: two methods, one seed, the digits."""
    out = tmp_path_factory.mktemp("campaign")
    small = ["--validation", "32", "--subset", "128", "--batch-size", "32"]
    teacher = ["distill", "--method", "ce", "--student", "resnet8", "--epochs", "1", *small]
    assert stablekd([*teacher, "--out", str(out / "teacher")]) == 0
    words = [
        "--data",
        "digits",
        "--teacher",
        "resnet8",
        "--student",
        "resnet8",
        "--teacher-weights",
        str(out / "teacher/student.safetensors"),
    ]
    words += [*small, "--epochs", "1", "--seeds", "1", "--threads", "1", "--methods", "kd", "blocks"]
    threads = torch.get_num_threads()
    main(["tune", *words, "--out", str(out / "live")])
    main(["test", *words, "--out", str(out / "live")])
    main(["test", *words, "--out", str(prepared(out)), "--remember", str(out / "outputs")])
    torch.set_num_threads(threads)
    return out


def prepared(out):
    (out / "remembered").mkdir()
    (out / "remembered" / "tuning.json").write_text((out / "live" / "tuning.json").read_text())
    return out / "remembered"


def test_the_best_setting_on_held_out_images_is_tested(campaign):
    tuning = json.loads((campaign / "live" / "tuning.json").read_text())
    kd = {row["setting"]: row["held_out_accuracy"] for row in tuning["rows"] if row["method"] == "kd"}
    assert kd.keys() == CANDIDATES["kd"].keys()
    assert kd[tuning["chosen"]["kd"]] == max(kd.values())
    runs = json.loads((campaign / "live" / "results.json").read_text())["runs"]
    assert [run["method"] for run in runs] == ["kd", "blocks"]
    config = read_events(campaign / "live" / "test" / "kd-0")[0]["config"]
    chosen = CANDIDATES["kd"][tuning["chosen"]["kd"]]
    assert config["optimizer"]["lr"] == chosen["optimizer"]["lr"]
    assert config["batch_size"] == chosen.get("batch_size", 32)


def test_a_remembered_teacher_changes_no_bit(campaign):
    for run in ("kd-0", "blocks-0"):
        live, remembered = (
            load_tensors(campaign / kind / "test" / run / "checkpoint.safetensors")[0]
            for kind in ("live", "remembered")
        )
        assert all(torch.equal(live[name], remembered[name]) for name in live)
    assert {path.parent.name for path in (campaign / "outputs").rglob("*.safetensors")} >= {
        "logits.fp32",
        "layer1.fp32",
    }


def test_a_finished_run_with_other_settings_is_refused(campaign):
    words = [
        "--data",
        "digits",
        "--teacher",
        "resnet8",
        "--student",
        "resnet8",
        "--teacher-weights",
        str(campaign / "teacher/student.safetensors"),
    ]
    words += ["--validation", "32", "--subset", "128", "--batch-size", "32", "--seeds", "1", "--methods", "kd"]
    with pytest.raises(CheckpointError, match="epochs: was 1.0, is 2.0"):
        main(["test", *words, "--epochs", "2", "--out", str(campaign / "live")])
    main(["test", *words, "--epochs", "1", "--out", str(campaign / "live")])


def test_a_curve_tests_each_number_of_images(campaign, tmp_path):
    words = [
        "--data",
        "digits",
        "--teacher",
        "resnet8",
        "--student",
        "resnet8",
        "--teacher-weights",
        str(campaign / "teacher/student.safetensors"),
    ]
    words += ["--tuning", str(campaign / "live" / "tuning.json"), "--subsets", "64", "96", "--validation", "32"]
    main(["test", *words, "--epochs", "1", "--seeds", "1", "--methods", "kd", "--out", str(tmp_path)])
    for images in (64, 96):
        (run,) = json.loads((tmp_path / str(images) / "results.json").read_text())["runs"]
        batch = read_events(tmp_path / str(images) / "test" / "kd-0")[0]["config"]["batch_size"]
        assert run["steps"] == images // batch


def test_every_method_has_at_most_six_settings():
    assert all(1 <= len(settings) <= 6 for settings in CANDIDATES.values())
