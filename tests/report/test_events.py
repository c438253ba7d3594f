import io
import json
import math
import sys
import types

import numpy as np
import pytest
import torch
from rich.console import Console

from stablekd_fast.errors import CheckpointError, ConfigError, TrainingError
from stablekd_fast.report import Recorder, read_events
from stablekd_fast.report.progress import Bar
from stablekd_fast.report.tensorboard import open_scalars

EVALUATION = {"epoch": 1.0, "split": "validation", "accuracy": 0.6325, "top5": 0.9, "loss": 1.06}
TRAIN = {"epoch": 0.5, "lr": 0.01, "images_per_second": 812.4, "data_wait_share": 0.1}


@pytest.fixture
def record(tmp_path):
    """A recorder on one directory, silent and without TensorBoard unless said otherwise."""

    def build(**options) -> Recorder:
        return Recorder(tmp_path, **{"progress": False, "tensorboard": False, **options})

    return build


def without_time(events):
    return [{key: value for key, value in event.items() if key != "time"} for event in events]


def test_events_come_back_as_they_were_written(record, tmp_path):
    with record() as recorder:
        recorder.emit("stage_start", step=0, stage=0, name="1|2", groups=[[0], [1]])
        recorder.emit("train", step=4, losses={"1": 0.25, "ü": 1e-9})
    first, second = read_events(tmp_path)
    assert first["time"] <= second["time"]
    assert without_time([first, second]) == [
        {"kind": "stage_start", "step": 0, "stage": 0, "name": "1|2", "groups": [[0], [1]]},
        {"kind": "train", "step": 4, "losses": {"1": 0.25, "ü": 1e-9}},
    ]


def test_every_line_is_on_disk_at_once_and_strict_json(record, tmp_path):
    def refuse(token):
        raise AssertionError(f"{token} is no JSON")

    with record() as recorder:
        numbers = [math.nan, torch.tensor(math.inf), np.float32("-inf"), torch.tensor(3), np.int64(4), 0.5]
        recorder.emit("train", step=1, numbers=numbers, losses={"1": math.nan}, where=tmp_path)
        line = (tmp_path / "events.jsonl").read_text()
    event = json.loads(line, parse_constant=refuse)
    assert event["numbers"] == [None, None, None, 3, 4, 0.5]
    assert event["losses"] == {"1": None} and event["where"] == str(tmp_path)


def test_a_torn_last_line_is_left_out(record, tmp_path):
    with record() as recorder:
        recorder.emit("train", step=1)
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write('{"kind": "train", "st')
    assert [event["step"] for event in read_events(tmp_path)] == [1]


def test_resuming_drops_what_came_after_the_step_and_the_torn_line(record, tmp_path):
    with record() as recorder:
        recorder.emit("run_start", step=0, method="kd", total_steps=9)
        for step in (2, 4, 6):
            recorder.emit("train", step=step, losses={}, **TRAIN)
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 7')
    with record(resume_step=4) as recorder:
        recorder.emit("train", step=6, losses={}, **TRAIN)
    found = [(event["kind"], event["step"]) for event in read_events(tmp_path)]
    assert found == [("run_start", 0), ("train", 2), ("train", 4), ("resume", 4), ("train", 6)]
    assert [path.name for path in tmp_path.iterdir()] == ["events.jsonl"]


def test_resuming_without_a_log_begins_one(record, tmp_path):
    with record(resume_step=4):
        pass
    assert without_time(read_events(tmp_path)) == [{"kind": "resume", "step": 4}]


def test_a_new_run_begins_a_new_log(record, tmp_path):
    for step in (1, 2):
        with record() as recorder:
            recorder.emit("train", step=step)
    assert [event["step"] for event in read_events(tmp_path)] == [2]


def test_a_failed_truncation_leaves_the_log(record, tmp_path, monkeypatch):
    with record() as recorder:
        recorder.emit("train", step=1)
        recorder.emit("train", step=9)
    before = (tmp_path / "events.jsonl").read_bytes()

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(TrainingError, match="No space left"):
        record(resume_step=1).__enter__()
    assert (tmp_path / "events.jsonl").read_bytes() == before


def test_a_damaged_line_is_named(tmp_path):
    (tmp_path / "events.jsonl").write_text('{"kind": "train", "step": 1}\n[1]\n{"kind": "train", "step": 2}\n')
    with pytest.raises(CheckpointError, match=r"line 2 is not an event but b'\[1\]'"):
        read_events(tmp_path)


def test_no_log_means_no_events(tmp_path):
    assert read_events(tmp_path) == []


def test_a_directory_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(TrainingError, match="Could not write .*events.jsonl: .*choose another --out"):
        Recorder(tmp_path / "file" / "run", progress=False, tensorboard=False).__enter__()


def test_progress_off_a_terminal_is_one_line_per_evaluation(record, capsys):
    with record(progress=True) as recorder:
        recorder.emit("run_start", step=0, method="stablekd", total_steps=20)
        recorder.emit("stage_start", step=0, stage=0, name="1|2")
        recorder.emit("train", step=5, losses={"1": 0.5, "2": 0.25}, **TRAIN)
        recorder.emit("evaluate", step=10, **EVALUATION)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "step 10/20 (epoch 1.00, stage 1|2): validation accuracy 63.25%, loss 1.0600\n"


def test_a_resumed_run_still_knows_how_many_steps_it_has(record, capsys):
    with record() as recorder:
        recorder.emit("run_start", step=0, method="stablekd", total_steps=20)
        recorder.emit("evaluate", step=5, **EVALUATION)
    with record(progress=True, resume_step=5) as recorder:
        recorder.emit("evaluate", step=10, **EVALUATION)
    assert capsys.readouterr().err.startswith("step 10/20 ")


def test_scalars_are_written_and_closed(tmp_path, monkeypatch):
    """By a writer with the signature of TensorBoard's."""
    written, closed = [], []

    class SummaryWriter:
        def __init__(self, directory, purge_step):
            written.append((directory, purge_step))

        def add_scalar(self, tag, value, step, walltime):
            written.append((tag, value, step, walltime))

        def close(self):
            closed.append(True)

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    scalars = open_scalars(tmp_path, "auto", 4)
    scalars.show({"kind": "train", "step": 3, "time": 9.0, "losses": {"1+2": 0.5, "3": None}, **TRAIN})
    scalars.close()
    assert written[:2] == [(str(tmp_path), 5), ("loss/1+2", 0.5, 3, 9.0)]
    assert [row[:2] for row in written[2:]] == [
        (f"train/{name}", value) for name, value in TRAIN.items() if name in NAMES
    ]
    assert closed == [True]


NAMES = ("lr", "images_per_second", "data_wait_share")


def test_no_progress_is_silent(record, capsys):
    with record() as recorder:
        recorder.emit("evaluate", step=10, **EVALUATION)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_the_bar_shows_stage_speed_losses_and_accuracy():
    screen = io.StringIO()
    bar = Bar(Console(file=screen, force_terminal=True, width=140))
    bar.start()
    bar.show({"kind": "run_start", "method": "stablekd", "total_steps": 20})
    bar.show({"kind": "resume", "step": 4})
    bar.show({"kind": "stage_start", "name": "1|[red]2"})
    bar.show({"kind": "train", "step": 15, "losses": {"1": 0.5, "2": None}, **TRAIN})
    bar.show({"kind": "evaluate", "step": 15, **EVALUATION})
    bar.stop()
    shown = screen.getvalue()
    for text in ("1|[red]2", "15/20", "812 images/s", "1: 0.5000", "2: not finite", "validation accuracy 63.25%"):
        assert text in shown, text


def test_tensorboard_gets_the_scalars(record, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with record(tensorboard=True) as recorder:
        recorder.emit("train", step=5, losses={"1+2": 0.5, "3": math.nan}, **TRAIN)
        recorder.emit("evaluate", step=10, **EVALUATION)
        recorder.emit("merge", step=10, exposure_gap={"layer1": 1.5})
    log = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    log.Reload()
    tags = set(log.Tags()["scalars"])
    assert {"loss/1+2", "train/lr", "validation/accuracy", "exposure_gap/layer1"} <= tags and "loss/3" not in tags
    assert [(point.step, round(point.value, 4)) for point in log.Scalars("validation/accuracy")] == [(10, 0.6325)]


def test_missing_tensorboard_is_silent_unless_asked_for(record, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with record(tensorboard="auto") as recorder:
        recorder.emit("evaluate", step=1, **EVALUATION)
    assert not (tmp_path / "tensorboard").exists()
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        record(tensorboard=True)


def test_a_run_says_what_it_trains_on(record, capsys):
    told = {
        "name": "photos", "classes": 3, "training_images": 1200, "held_out": 48, "test_images": 300, "left_out": {},
        "notes": [],
    }  # fmt: skip
    with record(progress=True) as recorder:
        recorder.emit("data", step=0, **told)
    assert "photos: 3 classes, 1,200 training images, 48 held out, 300 test" in capsys.readouterr().err


def test_a_terminal_that_is_gone_does_not_end_a_run(record, tmp_path, monkeypatch):
    class Gone(io.StringIO):
        def write(self, text):
            raise OSError(5, "Input/output error")

    with record(progress=True) as recorder:
        monkeypatch.setattr(sys, "stderr", Gone())
        recorder.emit("teacher", step=0, accuracy=0.5, images=10, split="held-out")
        recorder.emit("evaluate", step=4, **EVALUATION)
    assert [event["kind"] for event in read_events(tmp_path)] == ["teacher", "evaluate"]
