"""Files of versions before the formats had a number: students, logs and results are read, checkpoints refused."""

import shutil
import sys
import warnings
from pathlib import Path

import pytest
import safetensors
import torch

from stablekd_fast.cache import CacheSettings
from stablekd_fast.engine.checkpoint import check_same_run, load_metadata
from stablekd_fast.errors import CheckpointError
from stablekd_fast.models.weights import card_of, load_weights
from stablekd_fast.report import read_events, read_results, write_report
from stablekd_fast.run.distiller import Distiller

FORMATS = Path(__file__).parent / "formats"
EARLIER = sorted(path.name for path in (FORMATS / "earlier").iterdir())
sys.path.insert(0, str(FORMATS))
from make import network, settings  # noqa: E402 - it lies beside the files that it makes


@pytest.fixture(params=EARLIER)
def out(request):
    return FORMATS / "earlier" / request.param


def tensors_in(path):
    with safetensors.safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def test_a_student_has_its_values(out):
    model, stored = network(9), tensors_in(out / "student.safetensors")
    load_weights(model, out / "student.safetensors")
    loaded = model.state_dict()
    assert loaded.keys() == stored.keys() and all(torch.equal(loaded[name], stored[name]) for name in stored)
    card = card_of(out / "student.safetensors")
    assert card["classes"] == [str(digit) for digit in range(10)] and card["data"] == "digits"
    assert ("mean" in card) == (out.name == "2026-11-27")


def test_log_and_results_are_read_and_shown(out, tmp_path):
    events, (run,) = read_events(out), read_results(out / "results.json")["runs"]
    assert [event["step"] for event in events if event["kind"] == "train"] == [1, 2]
    assert (run["method"], run["steps"], run["epochs"]) == ("blocks", 2, 1.0)
    [tested] = [event["accuracy"] for event in events if event["kind"] == "evaluate"]
    assert tested == run["accuracy"]
    write_report(tmp_path / "report.html", [run], {"blocks": events}, "A run")
    assert f"{100 * run['accuracy']:.2f}" in (tmp_path / "report.html").read_text()


def test_a_checkpoint_is_refused_with_what_to_do(out, tmp_path):
    """Its settings are not those of this version, so nobody could give the same ones."""
    shutil.copytree(out, tmp_path / "out")
    before = (tmp_path / "out" / "checkpoint.safetensors").read_bytes()
    config = settings(tmp_path, resume=True, extend=True, epochs=2.0)
    config.cache = CacheSettings(plan="live")
    with warnings.catch_warnings(), pytest.raises(CheckpointError) as refused:
        warnings.simplefilter("ignore")
        Distiller(config, teacher=network(0), student=network(1)).run(progress=False)
    told = str(refused.value)
    assert "was written by another version" in told and "Resume the run with that version, or start anew" in told
    assert "was None" not in told
    assert (tmp_path / "out" / "checkpoint.safetensors").read_bytes() == before


def test_a_setting_that_this_version_lacks_is_named():
    own = {"seed": 0, "images": "these", "deterministic": False}
    check_same_run(Path("c"), {"seed": 0}, own)  # what older checkpoints lack, as it was then
    with pytest.raises(CheckpointError, match=r"another version .*\(new\)"):
        check_same_run(Path("c"), {**own, "new": 1}, own)
    with pytest.raises(CheckpointError, match="seed: was 1, is 0"):
        check_same_run(Path("c"), {"seed": 1}, own)


def test_progress_of_a_checkpoint_is_read(out):
    metadata = load_metadata(out / "checkpoint.safetensors")
    assert metadata["progress"]["step"] == 2 and metadata["identity"]["method"] == "blocks"
    assert ("plan" in metadata, "layouts" in metadata) == (out.name > "2026-11-23", out.name > "2026-11-24")
    assert torch.equal(
        tensors_in(out / "checkpoint.safetensors")["student/0.0.weight"],
        tensors_in(out / "student.safetensors")["0.0.weight"],
    )
