"""The comparison of recordings sees what it is for: another bit of a weight, another logged number, another page."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from stablekd_fast.engine.checkpoint import save_tensors

spec = importlib.util.spec_from_file_location("same_runs", Path(__file__).parent / "same_runs.py")
same_runs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(same_runs)

EVENTS = [
    {"kind": "run_start", "time": 1.0, "step": 0, "config": {"out": "a", "epochs": 2.0}, "machine": {"cpu": "x"}},
    {"kind": "train", "time": 2.0, "step": 20, "losses": {"1": 0.25, "2": 0.5}, "images_per_second": 100.0},
]
PAGE = (
    '<h3>Machine</h3><dl><div><dt>cpu</dt><dd>{cpu}</dd></div></dl>\n<path id="loss-m{hash}"/>\n'
    '<table><thead><tr><th scope="col">accuracy %</th><th scope="col">time</th></tr></thead><tbody>\n'
    "<tr><td>{accuracy}</td><td>{seconds} s</td></tr>\n</tbody></table>\n<div><dt>epochs</dt><dd>{epochs}</dd></div>"
)
SHOWN = {"cpu": "x", "hash": "0123456789", "accuracy": "90.00", "seconds": 3, "epochs": 2}


@pytest.fixture
def recording(tmp_path):
    """A folder with one run; `changed` is applied to its parts before they are written."""

    def make(name: str, changed=lambda parts: None) -> Path:
        parts = {
            "weights": {"w": torch.arange(4.0)},
            "events": json.loads(json.dumps(EVENTS)),
            "results": {"runs": [{"accuracy": 0.9, "wall_seconds": 3.0}], "machine": {"cpu": name}},
            "page": dict(SHOWN),
        }
        changed(parts)
        folder = tmp_path / name / "run"
        folder.mkdir(parents=True)
        save_tensors(folder / "student.safetensors", parts["weights"], {"data": name})
        (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in parts["events"]))
        (folder / "results.json").write_text(json.dumps(parts["results"]))
        (folder / "report.html").write_text(PAGE.format(**parts["page"]))
        return folder.parent

    return make


def test_clock_place_and_machine_do_not_count(recording):
    def elsewhere(parts):
        parts["events"][0] |= {"time": 9.0, "config": {"out": "b", "epochs": 2.0}, "machine": {"cpu": "y"}}
        parts["events"][1]["images_per_second"] = 50.0
        parts["results"]["runs"][0]["wall_seconds"] = 6.0
        parts["page"] |= {"cpu": "y", "hash": "abcdefabcd", "seconds": 6}

    assert same_runs.differences(recording("before"), recording("after", elsewhere)) == []


CHANGES = {
    "a bit of a weight": lambda parts: parts["weights"]["w"].view(torch.int32)[1].bitwise_xor_(1),
    "a logged loss": lambda parts: parts["events"][1]["losses"].update({"2": 0.5000001}),
    "a setting in the log": lambda parts: parts["events"][0]["config"].update(epochs=3.0),
    "an event more": lambda parts: parts["events"].append({"kind": "checkpoint", "step": 20}),
    "an accuracy": lambda parts: parts["results"]["runs"][0].update(accuracy=0.91),
    "a cell of the page": lambda parts: parts["page"].update(accuracy="91.00"),
    "a setting on the page": lambda parts: parts["page"].update(epochs=3),
}


@pytest.mark.parametrize("what", CHANGES)
def test_every_other_number_counts(recording, what):
    before, after = recording("before"), recording("after", CHANGES[what])
    assert len(same_runs.differences(before, after)) == 1


def test_a_missing_run_counts(recording, tmp_path):
    before, after = recording("before"), recording("after")
    (after / "run" / "results.json").unlink()
    assert "results.json" in same_runs.differences(before, after)[0]
    assert same_runs.differences(tmp_path / "nothing", before) == [f"{tmp_path / 'nothing'} holds no run"]
