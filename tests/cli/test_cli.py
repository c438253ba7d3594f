"""The command line as a person uses it: real runs on the embedded digits, small enough for a test."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open

from stablekd_fast.cli import RUN, _parser, main
from stablekd_fast.run.exported import evaluate_file
from tests.processes import output_of

SMALL = ["--subset", "128", "--validation", "32", "--epochs", "1", "--batch-size", "32", "--bn-images", "64"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """A teacher trained by the documented way: `--method ce`."""
    out = tmp_path_factory.mktemp("teacher")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert main(["distill", "--method", "ce", "--student", "resnet32", *SMALL, "--out", str(out / "run")]) == 0
    torch.set_num_threads(threads)
    return out / "run"


@pytest.fixture(scope="module")
def student(teacher, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("student") / "run"
    weights = str(teacher / "student.safetensors")
    arguments = ["--teacher", "resnet32", "--teacher-weights", weights, "--student", "resnet20", *SMALL]
    assert main(["distill", *arguments, "--epochs", "3", "--seed", "5", "--out", str(out)]) == 0
    return out


def test_a_run_leaves_everything_it_promises(student):
    results = json.loads((student / "results.json").read_text())
    (run,) = results["runs"]
    assert run["method"] == "stablekd" and run["seed"] == 5 and run["epochs"] == 3.0 and run["steps"] == 12
    assert 0 <= run["accuracy"] <= 1 and run["images_per_second"] > 0 and run["wall_seconds"] > 0
    assert results["machine"] and results["versions"]["torch"] == torch.__version__
    kinds = [json.loads(line)["kind"] for line in (student / "events.jsonl").open()]
    assert kinds[0] == "run_start" and kinds[-1] == "run_end"
    assert kinds.count("stage_start") == 2 and kinds.count("merge") == 1
    assert "stablekd" in (student / "report.html").read_text()
    assert not list(student.glob(".*.tmp"))


def test_the_exported_student_is_the_plain_model(student):
    from stablekd_fast import models

    with safe_open(student / "student.safetensors", "pt") as file:
        assert set(file.keys()) == set(models.build("resnet20", 10).state_dict())


@pytest.mark.parametrize("name", ["student.safetensors", "checkpoint.safetensors"])
def test_evaluating_a_file_gives_the_run_s_accuracy(student, name, capsys):
    assert main(["evaluate", str(student / name)]) == 0
    (run,) = json.loads((student / "results.json").read_text())["runs"]
    assert f"{run['accuracy']:.4g}" in capsys.readouterr().out


def test_a_checkpoint_is_evaluated_with_statistics_of_its_own_views(teacher, tmp_path):
    """Images are altered and the view seed is another: the statistics are still those of the training, to the bit."""
    out, weights = tmp_path / "run", str(teacher / "student.safetensors")
    arguments = ["--teacher", "resnet32", "--teacher-weights", weights, "--student", "resnet20", *SMALL]
    arguments += ["--mix", "mixup", "--jitter", "0.5", "--view-seed", "9"]
    assert main(["distill", *arguments, "--epochs", "1", "--out", str(out)]) == 0
    events = [json.loads(line) for line in (out / "events.jsonl").open()]
    (tested,) = [event for event in events if event["kind"] == "evaluate" and event["split"] == "test"]
    assert evaluate_file(out / "checkpoint.safetensors").loss == tested["loss"]


def test_a_finished_run_is_not_overwritten_and_resumes_to_itself(student, teacher, capsys):
    weights = str(teacher / "student.safetensors")
    arguments = ["distill", "--teacher", "resnet32", "--teacher-weights", weights, "--student", "resnet20", *SMALL]
    arguments += ["--epochs", "3", "--seed", "5", "--out", str(student)]
    before = (student / "student.safetensors").read_bytes()
    assert main(arguments) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert main([*arguments, "--resume"]) == 0
    assert (student / "student.safetensors").read_bytes() == before


def test_a_student_goes_on_from_given_weights(student, teacher, tmp_path):
    out = tmp_path / "more"
    arguments = ["--student", "resnet20", "--student-weights", str(student / "student.safetensors"), "--method", "ce"]
    assert main(["distill", *arguments, *SMALL, "--optimizer.lr", "0", "--out", str(out)]) == 0
    with safe_open(student / "student.safetensors", "pt") as a, safe_open(out / "student.safetensors", "pt") as b:
        assert torch.equal(a.get_tensor("conv1.weight"), b.get_tensor("conv1.weight"))


def test_yaml_settings_can_be_overridden(tmp_path, capsys):
    config = tmp_path / "run.yaml"
    settings = {"method": "ce", "student": "resnet20", "subset": 64, "validation": 0, "batch_size": 32, "epochs": 9}
    settings |= {"optimizer": {"name": "sgd", "lr": 0.05}, "logits_options": {"label_smoothing": 0.1}}
    config.write_text(yaml.safe_dump(settings))
    out = tmp_path / "run"
    words = ["distill", "--config", str(config), "--epochs", "1", "--optimizer.lr", "0.01", "--out", str(out)]
    assert main(words) == 0
    start = json.loads((out / "events.jsonl").open().readline())
    used = start["config"]
    assert used["epochs"] == 1 and used["subset"] == 64 and used["logits_options"] == {"label_smoothing": 0.1}
    assert used["optimizer"]["name"] == "sgd" and used["optimizer"]["lr"] == 0.01


def test_stages_can_be_given_in_yaml(teacher, tmp_path):
    config = tmp_path / "run.yaml"
    stages = [
        {"groups": [[0], [1], [2, 3]], "steps": 3},
        {"groups": [[0, 1, 2, 3]], "share": 1, "optimizer": {"lr": 0.1}},
    ]
    config.write_text(yaml.safe_dump({"stages": stages, "student": "resnet20", "teacher": "resnet32"}))
    out = tmp_path / "run"
    weights = ["--teacher-weights", str(teacher / "student.safetensors")]
    assert main(["distill", "--config", str(config), *weights, *SMALL, "--epochs", "2", "--out", str(out)]) == 0
    names = [e["name"] for e in map(json.loads, (out / "events.jsonl").open()) if e["kind"] == "stage_start"]
    assert names == ["1|2|3+4", "1+2+3+4"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["distill", "--metod", "kd"], ": --metod kd. The nearest valid name is --method."),
        (["distill", "--teacher_weigts", "x"], ": --teacher-weigts x. The nearest valid name is --teacher-weights."),
        (["cache", "build", "--cache.disk-budgt=3"], "=3. The nearest valid name is --cache.disk-budget."),
        (["distill", "--batch_size"], "argument --batch-size: expected one argument"),
        (["plan", "--teacher", "resnet56"], "are required: --student"),
        (["evaluate"], "are required: weights"),
        (["distill", "--method", "stablekt"], "does not exist; the nearest is 'stablekd' (all: at, "),
        (["distill", "--method", "kd"], "needs a trained teacher"),
        (["distill", "--data", "/does/not/exist", "--method", "ce"], "no data set at /does/not/exist"),
        (["distill", "--method", "ce", "--student", "resnet21"], "resnet20"),
        (["distill", "--method", "ce", "--student", "resnet20", "--device", "quantum"], "device 'quantum'"),
        (["distill", "--method", "ce", "--student", "resnet20", "--subset", "128", "--batch-size", "4096"], "4096"),
        (["distill", "--method", "ce", "--logits-options.temprature", "3"], "nearest is 'temperature'"),
        (["distill", "--teacher-weights", "/no/file.pt"], "/no/file.pt"),
        (["distill", "--epochs", "-1"], "epochs"),
        (["distill", "--cache.disk-budget", "1GB"], "give --cache.directory"),
        (["evaluate", "/no/student.safetensors"], "/no/student.safetensors"),
        (
            ["plan", "--teacher", "resnet56", "--student", "resnet20", "--image-size", "32", "--cuts", "[layr1]"],
            "layer1",
        ),
    ],
)
def test_mistakes_are_one_clear_sentence(words, message, tmp_path, capsys):
    out = tmp_path / "run"
    if words[0] == "distill":
        words = [*words, "--out", str(out)]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("stablekd: ") and "Traceback" not in error
    assert not (out / "student.safetensors").exists() and not (out / "results.json").exists()


def test_a_teacher_of_other_classes_is_refused(teacher, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    weights = load_file(teacher / "student.safetensors")
    weights["linear.weight"], weights["linear.bias"] = torch.zeros(100, 64), torch.zeros(100)
    save_file(weights, tmp_path / "hundred.safetensors")
    words = ["distill", "--teacher", "resnet32", "--teacher-weights", str(tmp_path / "hundred.safetensors")]
    assert main([*words, "--student", "resnet20", "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "100" in error and "10" in error


def test_an_unknown_key_in_yaml_names_the_nearest(tmp_path, capsys):
    config = tmp_path / "run.yaml"
    for line, nearest in (("epohcs: 3", "'epochs'"), ("batchsize: 3", "'batch_size'")):
        config.write_text(f"{line}\n")
        assert main(["distill", "--config", str(config)]) == 2
        assert f"The nearest valid name is {nearest}." in capsys.readouterr().err


def test_plan_and_info_print_tables(capsys):
    assert main(["plan", "--teacher", "resnet56", "--student", "resnet20_half", "--image-size", "32"]) == 0
    plan = capsys.readouterr().out
    assert "layer3" in plan and "select" in plan
    assert main(["info"]) == 0
    assert "feature_mse" in capsys.readouterr().out


COMMANDS = ["", *_parser()[1], "distill --optimizer.help"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_options_with_hyphens(command, capsys):
    words = command.split()
    with pytest.raises(SystemExit, match="^0$"):
        main(words if words[-1:] == ["--optimizer.help"] else [*words, "--help"])
    shown = capsys.readouterr().out
    assert shown.startswith("usage: ") and "--" in shown
    assert not re.findall(r"--[\w.-]*_[\w.-]*", shown)
    if words in (["distill"], ["cache", "build"]):
        assert all(f" {name} " in shown for name in ("--teacher-weights", "--cache.disk-budget", "--print-config"))


@pytest.mark.parametrize("spelling", ["--log-every", "--log_every", "--cache.host-budget", "--cache.host_budget"])
def test_options_may_be_typed_either_way(spelling, monkeypatch):
    given = []
    monkeypatch.setitem(RUN, "distill", lambda options: given.append(options) or 0)
    assert main(["distill", spelling, "3"]) == 0 and main(["distill", f"{spelling}=3"]) == 0
    for options in given:
        found = options.log_every if "log" in spelling else options.cache.host_budget
        assert str(found) == "3"


def test_help_says_what_settings_mean():
    """A process of its own: what jsonargparse is told about descriptions outlasts a command."""
    shown = output_of("-m", "stablekd_fast", "distill", "--help")
    assert "Training images to use, with the classes in the proportions of the whole" in " ".join(shown.split())


def test_the_command_is_installed_and_fails_with_a_code():
    stablekd = Path(sys.executable).with_name("stablekd")
    assert subprocess.run([stablekd, "--version"], capture_output=True).returncode == 0
    assert subprocess.run([stablekd, "distill", "--method", "x"], capture_output=True).returncode == 2
    module = subprocess.run([sys.executable, "-m", "stablekd_fast", "plan"], capture_output=True, text=True)
    assert module.returncode == 2 and "required: --teacher, --student" in module.stderr


def test_importing_changes_nothing():
    script = """
import os, torch
before = torch.get_num_threads(), dict(os.environ), torch.random.get_rng_state()
import stablekd_fast, stablekd_fast.run.distiller, stablekd_fast.cli, stablekd_fast.kernels
assert torch.get_num_threads() == before[0] and dict(os.environ) == before[1]
assert torch.equal(torch.random.get_rng_state(), before[2])
assert not torch.cuda.is_initialized()
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_broken_image_stops_the_run_or_is_counted(tmp_path, capsys):
    from PIL import Image

    for split, count in (("train", 24), ("test", 6)):
        for label in ("cat", "dog"):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (16, 16), (9 * i, 90, 200 if label == "cat" else 20)).save(folder / f"{i}.png")
    broken = tmp_path / "images" / "train" / "cat" / "3.png"
    broken.write_bytes(broken.read_bytes()[:40])
    words = ["distill", "--data", str(tmp_path / "images"), "--method", "ce", "--student", "resnet20"]
    words += ["--batch-size", "8", "--epochs", "1", "--validation", "0"]
    assert main([*words, "--out", str(tmp_path / "stopped")]) == 2
    assert str(broken) in capsys.readouterr().err
    assert main([*words, "--on-bad-image", "skip", "--out", str(tmp_path / "counted")]) == 0
    (run,) = json.loads((tmp_path / "counted" / "results.json").read_text())["runs"]
    assert run["skipped_images"] == 1
    events = [json.loads(line) for line in (tmp_path / "counted" / "events.jsonl").open()]
    assert [e["images"][0][0] for e in events if e["kind"] == "skipped_images"] == [str(broken)]
