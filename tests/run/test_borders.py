"""What a run meets at its borders: other data at a resume, test images that are bad, a full disk."""

import errno
import json
import linecache
import shutil
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch.fx.graph_module import _loader

from stablekd_fast import distill, evaluate_file, models
from stablekd_fast.cache import CacheSettings
from stablekd_fast.data import contents, open_dataset
from stablekd_fast.data.source import TrainSource
from stablekd_fast.errors import CheckpointError, ConfigError, DataError
from stablekd_fast.models.weights import card_of
from stablekd_fast.run import distiller

SMALL = {
    "method": "ce", "student": "resnet20_half", "epochs": 2.0, "batch_size": 8, "validation": 0.0, "bn_images": 16,
    "progress": False, "precision": "fp32", "checkpoint_every": 1,
}  # fmt: skip


def run(root, out, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return distill(**{**SMALL, "data": str(root), "out": str(out), **settings})


@pytest.fixture
def tree(tmp_path):
    """Makes a folder of two classes; images of 70 pixels are large, of 16 small."""

    def make(size=16, train=16, test=8, name="data"):
        for part, count in (("train", train), ("test", test)):
            for label, kind in enumerate("ab"):
                (tmp_path / name / part / kind).mkdir(parents=True)
                for number in range(count):
                    pixels = np.random.default_rng([label, number]).integers(0, 256, (size, size, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(tmp_path / name / part / kind / f"{number:02}.jpg")
        return tmp_path / name

    return make


def stopped(monkeypatch, root, out, at=3, **settings):
    """A run that is interrupted before a step."""
    positions = TrainSource.positions

    def interrupted(self, step):
        if step >= at:
            raise KeyboardInterrupt
        return positions(self, step)

    with monkeypatch.context() as patched:
        patched.setattr(TrainSource, "positions", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(root, out, **settings)
    assert (out / "checkpoint.safetensors").exists()


def swap(root):
    """Exchange the labels of all training images."""
    for one, other in (("a", "c"), ("b", "a"), ("c", "b")):
        (root / "train" / one).rename(root / "train" / other)


@pytest.mark.parametrize("size", [16, 70])
def test_a_run_does_not_go_on_with_other_labels(tree, tmp_path, monkeypatch, size):
    root = tree(size)
    stopped(monkeypatch, root, tmp_path / "out", image_size=16)
    swap(root)
    with pytest.raises(CheckpointError, match="other training images.*have changed since. Put the images back"):
        run(root, tmp_path / "out", resume=True, image_size=16)
    swap(root)
    assert run(root, tmp_path / "out", resume=True, image_size=16).steps == 8


def test_a_run_of_many_images_does_not_go_on_with_changed_ones(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(contents, "READ_AT_ONCE", 0)
    root = tree(70)
    stopped(monkeypatch, root, tmp_path / "out", image_size=16)
    assert (tmp_path / "out" / "images.log").stat().st_size % 32 == 0
    for path in (root / "train").rglob("*.jpg"):
        Image.new("RGB", (70, 70)).save(path)
    with pytest.raises(DataError, match="images.log was made from: .*train/./...jpg and .* more"):
        run(root, tmp_path / "out", resume=True, image_size=16)


def test_a_run_goes_on_with_the_same_images_at_another_place(tree, tmp_path, monkeypatch):
    root = tree(70)
    whole = run(root, tmp_path / "whole", image_size=16)
    stopped(monkeypatch, root, tmp_path / "out", image_size=16)
    shutil.move(root, tmp_path / "moved")
    resumed = run(tmp_path / "moved", tmp_path / "out", resume=True, image_size=16)
    assert (resumed.accuracy, resumed.steps) == (whole.accuracy, whole.steps)
    assert evaluate_file(tmp_path / "out" / "student.safetensors").accuracy == whole.accuracy


@pytest.mark.parametrize("many", [False, True])
def test_rows_of_changed_images_are_not_served(tree, tmp_path, monkeypatch, many):
    if many:
        monkeypatch.setattr(contents, "READ_AT_ONCE", 0)
    root = tree(70)
    torch.manual_seed(0)
    teacher = models.build("resnet20", 2)
    rows = CacheSettings(directory=str(tmp_path / "rows"), plan="all")
    settings = {"method": "stablekd", "teacher": teacher, "views": 1, "cache": rows, "image_size": 16}
    first = run(root, tmp_path / "first", **settings)
    shutil.copytree(root, tmp_path / "copied")
    copied = run(tmp_path / "copied", tmp_path / "second", **settings)
    assert copied.accuracy == first.accuracy, "the same images at another place keep their rows"
    Image.new("RGB", (70, 70)).save(root / "train" / "b" / "07.jpg")
    with pytest.raises(Exception, match=r"b/07.jpg|made for something else \(data.digest"):
        run(root, tmp_path / "third", **settings)


def test_bad_test_images_cost_a_line_and_not_a_run(tree, tmp_path):
    root = tree(70)
    bad = root / "test" / "a" / "03.jpg"
    bad.write_bytes(bad.read_bytes()[:300])
    out = tmp_path / "out"
    with pytest.warns(
        UserWarning, match=r"1 test images could not be read.*a/03.jpg .*What was reached is that of 15 images"
    ):
        result = distill(**{**SMALL, "data": str(root), "out": str(out), "image_size": 16})
    events = [json.loads(line) for line in (out / "events.jsonl").open()]
    assert [event["images"][0][0] for event in events if event["kind"] == "skipped_images"] == [str(bad)]
    assert result.skipped_images == 1 and card_of(out / "student.safetensors")["accuracy"] == result.accuracy


@pytest.mark.parametrize("on_bad_image", ["stop", "skip"])
@pytest.mark.parametrize("size", [16, 70])
def test_a_test_split_of_bad_images_alone_is_said_and_the_student_is_there(tree, tmp_path, on_bad_image, size):
    root = tree(size)
    for path in (root / "test").rglob("*.jpg"):
        path.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(DataError, match="None of .*The student is trained and lies in .*out/student.safetensors"):
        run(root, tmp_path / "out", image_size=16, on_bad_image=on_bad_image)
    assert models.build("resnet20_half", 2) and "accuracy" not in card_of(tmp_path / "out" / "student.safetensors")
    models.load_weights(models.build("resnet20_half", 2), tmp_path / "out" / "student.safetensors")


def test_bad_images_may_be_left_out_from_a_resume_on(tree, tmp_path):
    root = tree(70)
    bad = root / "train" / "b" / "05.jpg"
    good = bad.read_bytes()
    bad.write_bytes(good[:300])
    with pytest.raises(DataError, match="b/05.jpg"):
        run(root, tmp_path / "out", image_size=16, batch_size=4, epochs=3.0, seed=1)
    settings = {"image_size": 16, "batch_size": 4, "epochs": 3.0, "seed": 1, "on_bad_image": "skip"}
    assert (tmp_path / "out" / "checkpoint.safetensors").exists(), "choose a seed that meets the image later"
    assert run(root, tmp_path / "out", resume=True, **settings).skipped_images == 1


@pytest.mark.parametrize("what", ["write_results", "write_run_report"])
def test_a_disk_that_is_full_at_the_end_costs_a_line(tree, tmp_path, monkeypatch, what):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(distiller, what, full)
    with pytest.warns(RuntimeWarning, match="The student is saved, but not .*No space left"):
        result = distill(**{**SMALL, "data": str(tree()), "out": str(tmp_path / "out")})
    assert evaluate_file(tmp_path / "out" / "student.safetensors").accuracy == result.accuracy


def test_brackets_in_a_path_are_only_brackets(tree, tmp_path):
    out = tmp_path / "[run] [/] [bold"
    result = run(tree(name="da[t]a"), out)
    assert json.loads((out / "results.json").read_text())["runs"][0]["accuracy"] == result.accuracy
    assert (out / "report.html").exists()


def test_a_data_set_of_three_splits_is_used_as_what_it_is(tmp_path):
    for part, count in (("train", 20), ("val", 6), ("test", 10)):
        for label, kind in enumerate("ab"):
            (tmp_path / "d" / part / kind).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (16, 16), (label * 200, number, 0)).save(
                    tmp_path / "d" / part / kind / f"{number}.png"
                )
    run(tmp_path / "d", tmp_path / "out", validation=0.04)
    events = [json.loads(line) for line in (tmp_path / "out" / "events.jsonl").open()]
    assert events[0]["steps_per_epoch"] == 5, "nothing of train is held out"
    assert {event["split"] for event in events if event["kind"] == "evaluate"} == {"validation", "test"}
    (data,) = [event for event in events if event["kind"] == "data"]
    assert (data["training_images"], data["held_out"], data["test_images"]) == (40, 12, 20)
    assert any("val is held out" in note for note in data["notes"])
    run(tmp_path / "d", tmp_path / "none", validation=0.0)


def test_a_batch_that_does_not_fit_names_both_numbers(tree, tmp_path):
    with pytest.raises(DataError, match="A batch of 30 does not fit 28 training images .4 of 32 are held out"):
        run(tree(), tmp_path / "out", batch_size=30, validation=4)


def test_normalisation_is_a_setting_and_travels(tree, tmp_path):
    root = tree()
    settings = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}
    result = run(root, tmp_path / "out", **settings)
    card = card_of(tmp_path / "out" / "student.safetensors")
    assert (card["mean"], card["std"]) == (settings["mean"], settings["std"])
    assert evaluate_file(tmp_path / "out" / "student.safetensors").accuracy == result.accuracy
    assert evaluate_file(tmp_path / "out" / "checkpoint.safetensors").accuracy == result.accuracy
    with pytest.raises(ConfigError, match=r"std=\[0.0, 0.6, 0.7\]"):
        run(root, tmp_path / "other", std=[0.0, 0.6, 0.7])
    assert open_dataset(root).mean != tuple(settings["mean"])


def stages_of(out):
    events = [json.loads(line) for line in (out / "events.jsonl").open()]
    return [(event["first_step"], event["last_step"]) for event in events if event["kind"] == "stage_start"]


def test_a_finished_run_is_extended_by_a_stage_like_its_last(tree, tmp_path, monkeypatch):
    """Extended, stopped and resumed once more, it is what it is when nothing stops it."""
    root = tree()
    run(root, tmp_path / "out", epochs=2.0)
    shutil.copytree(tmp_path / "out", tmp_path / "stopped")
    with pytest.raises(CheckpointError, match="epochs: was 2.0, is 4.0"):
        run(root, tmp_path / "out", epochs=4.0, resume=True)
    with pytest.raises(CheckpointError, match="epochs: was 2.0, is 1.0"):
        run(root, tmp_path / "out", epochs=1.0, resume=True, extend=True)
    with pytest.raises(ConfigError, match="extend was given without resume"):
        run(root, tmp_path / "new", epochs=4.0, extend=True)
    result = run(root, tmp_path / "out", epochs=4.0, resume=True, extend=True)
    assert result.steps == 16 and stages_of(tmp_path / "out") == [(0, 8), (8, 16)]
    rates = [json.loads(line) for line in (tmp_path / "out" / "events.jsonl").open()]
    rates = [event["lr"] for event in rates if event["kind"] == "train"]
    assert len(rates) >= 2

    positions = TrainSource.positions
    with monkeypatch.context() as patched:
        patched.setattr(
            TrainSource, "positions", lambda self, step: (_ for _ in ()).throw(KeyboardInterrupt) if step >= 12
            else positions(self, step),
        )  # fmt: skip
        with pytest.raises(KeyboardInterrupt):
            run(root, tmp_path / "stopped", epochs=4.0, resume=True, extend=True)
    again = run(root, tmp_path / "stopped", epochs=4.0, resume=True)
    assert (again.accuracy, again.steps) == (result.accuracy, 16)
    one, other = ((tmp_path / name / "student.safetensors").read_bytes() for name in ("out", "stopped"))
    assert one == other
    longer = run(root, tmp_path / "stopped", epochs=5.0, resume=True, extend=True)
    assert longer.steps == 20 and stages_of(tmp_path / "stopped")[-1] == (16, 20)


def test_a_distillation_is_extended_end_to_end(tree, tmp_path):
    torch.manual_seed(0)
    settings = {"method": "stablekd", "teacher": models.build("resnet20", 2), "views": 2}
    settings["cache"] = CacheSettings(directory=str(tmp_path / "rows"), plan="all")
    run(tree(), tmp_path / "out", epochs=3.0, **settings)
    result = run(tmp_path / "data", tmp_path / "out", epochs=5.0, resume=True, extend=True, **settings)
    assert result.steps == 20
    events = [json.loads(line) for line in (tmp_path / "out" / "events.jsonl").open()]
    groups = [event["groups"] for event in events if event["kind"] == "stage_start"]
    assert groups[-1] == groups[-2] and len(groups[-1]) == 1 and len(groups[0]) == 4


def test_runs_in_one_process_leave_no_sources_behind(tree, tmp_path):
    """torch.fx keeps what it writes for each block; over hundreds of runs that is memory."""
    root, kept = tree(), []
    for number in range(2):
        teacher = models.build("resnet20_half", 2, 16)
        run(root, tmp_path / f"out{number}", method="kd", teacher=teacher, epochs=1.0)
        kept.append((sum(name.startswith("<eval_with_key>") for name in linecache.cache), len(_loader.eval_cache)))
    assert kept[0] == kept[1]
