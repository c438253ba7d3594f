"""Recommenders by name: they train, are evaluated, go on after a stop, and take kept rows, as other networks do."""

import json
from dataclasses import asdict

import pytest
import torch

from stablekd_fast.cache import CacheSettings
from stablekd_fast.engine import loop
from stablekd_fast.engine.checkpoint import load_tensors
from stablekd_fast.errors import ConfigError, ModelError
from stablekd_fast.run.distiller import distill
from stablekd_fast.run.exported import evaluate_file

COMMON = dict(data="interactions", batch_size=100, device="cpu", progress=False, checkpoint_every=2)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    out = tmp_path_factory.mktemp("teacher")
    result = distill(method="bpr", student="mf/32", epochs=20, out=str(out), **COMMON)
    assert result.ranking.recall == result.accuracy > 0.12  # guessing reaches 20 of 400
    return str(out / "student.safetensors")


def settings(teacher, out, **more):
    return dict(
        method="unkd",
        teacher="mf/32",
        teacher_weights=teacher,
        student="mf/8",
        epochs=2,
        out=str(out),
        **COMMON,
        **more,
    )


def weights(out):
    return load_tensors(out / "student.safetensors")[0]


def test_a_run_its_files_and_its_evaluation(teacher, tmp_path):
    result = distill(**settings(teacher, tmp_path))
    (run,) = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert run["method"] == "unkd" and run["accuracy"] == run["ranking"]["recall"] == result.ranking.recall
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    splits = {event["split"] for event in events if event["kind"] == "evaluate" and "ranking" in event}
    assert splits == {"validation", "test"} and (tmp_path / "report.html").exists()
    again = evaluate_file(tmp_path / "student.safetensors", device="cpu")
    assert asdict(again.ranking) == pytest.approx(asdict(result.ranking))


@pytest.mark.parametrize("kept", [False, True])
def test_a_run_that_goes_on_ends_with_the_same_bits(teacher, tmp_path, kept, monkeypatch):
    more = dict(cache=CacheSettings(plan="all", host_budget="1GB")) if kept else {}
    distill(**settings(teacher, tmp_path / "whole", **more))
    original = loop.save_run

    def save_and_stop(parts, state):
        original(parts, state)
        if state.progress.step >= 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save_run", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        distill(**settings(teacher, tmp_path / "stopped", **more))
    monkeypatch.setattr(loop, "save_run", original)
    distill(**settings(teacher, tmp_path / "stopped", resume=True, **more))
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    events = map(json.loads, (tmp_path / "whole" / "events.jsonl").read_text().splitlines())
    rows = [event["rows"] for event in events if event["kind"] == "cache"]
    assert bool(rows) == kept and all(list(row.values()) == [600] for row in rows)
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_what_does_not_fit_is_said(teacher, tmp_path):
    with pytest.raises(ConfigError, match="unkd divides items by popularity"):
        distill(**settings(None, tmp_path) | dict(data="digits", method="ce", auxiliary="unkd", student="resnet8"))
    with pytest.raises(ModelError, match="mf/WIDTH is a matrix factorisation"):
        distill(**settings(teacher, tmp_path) | dict(student="mf/none"))
