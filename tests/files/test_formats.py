"""What earlier versions wrote is read with its values, or refused with what to do; so is what later ones write."""

import json
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch

from stablekd_fast.cache import CacheSettings, maintain
from stablekd_fast.cache.store import RowStore
from stablekd_fast.engine.checkpoint import load_metadata, load_tensors, save_tensors
from stablekd_fast.errors import CacheError, CheckpointError, ModelError, StableKDError
from stablekd_fast.models.weights import card_of, load_weights
from stablekd_fast.report import read_results
from stablekd_fast.report.events import read_events
from stablekd_fast.run.distiller import Distiller

FORMATS = Path(__file__).parent / "formats"
VERSIONS = sorted(path.name for path in FORMATS.iterdir() if path.is_dir() and path.name.isdigit())
sys.path.insert(0, str(FORMATS))
from make import network, settings  # noqa: E402 - it lies beside the files that it makes


@pytest.fixture(params=VERSIONS)
def version(request, tmp_path):
    shutil.copytree(FORMATS / request.param, tmp_path / request.param)
    return tmp_path / request.param


def test_a_student_of_each_version_has_its_values(version):
    model = network(9)
    load_weights(model, version / "out" / "student.safetensors")
    for name, values in json.loads((version / "student.json").read_text()).items():
        assert torch.equal(model.state_dict()[name], torch.tensor(values).to(model.state_dict()[name].dtype))
    card = card_of(version / "out" / "student.safetensors")
    assert card["classes"][3] == "3" and 0 <= card["accuracy"] <= 1


def test_a_flipped_bit_in_a_file_of_each_version_with_digests_is_noticed(version):
    path = version / "out" / "student.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    if version.name == "0":
        load_tensors(path)
        return
    with pytest.raises(CheckpointError, match="its tensor .* is not what was written there"):
        load_tensors(path)


def test_log_and_results_of_each_version_are_read(version):
    kinds = [event["kind"] for event in read_events(version / "out")]
    assert kinds[0] == "run_start" and kinds[-1] == "run_end" and kinds.count("stage_start") == 1
    (run,) = read_results(version / "out" / "results.json")["runs"]
    assert run["steps"] == 2 and run["accuracy"] == card_of(version / "out" / "student.safetensors")["accuracy"]


def test_a_run_of_each_version_is_gone_on_with(version, tmp_path):
    """To more epochs; its rows are made anew where they are of an older format."""
    path = version / "out" / "checkpoint.safetensors"
    before = load_tensors(path)[0]
    config = settings(version, resume=True, extend=True, epochs=2.0)
    config.cache = CacheSettings(plan="all", directory=str(tmp_path / "rows"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = Distiller(config, teacher=network(0), student=network(1)).run(progress=False)
    after = load_tensors(path)[0]
    assert result.steps == 4 and load_metadata(path)["progress"]["step"] == 4
    assert after.keys() == before.keys() and not torch.equal(after["student/0.0.weight"], before["student/0.0.weight"])


def test_rows_of_each_version_are_read_or_refused(version):
    column = version / "cache" / "logits.fp32"
    if json.loads((column / "manifest.json").read_text())["format"] == 2:
        with RowStore(column) as store:
            assert len(store) == 32 and store.verify() == 32
        return
    with pytest.raises(CacheError, match=r"is of format 1; this version reads 2.*cache gc"):
        RowStore(column)
    assert maintain.collect(version / "cache", ["logits.fp32"]) == ["logits.fp32"]


def test_versions_to_come_are_refused(tmp_path):
    shutil.copytree(FORMATS / VERSIONS[-1], tmp_path / "run")
    out = tmp_path / "run" / "out"
    for name in ("checkpoint", "student"):
        tensors, metadata = load_tensors(out / f"{name}.safetensors")
        save_tensors(out / f"{name}.safetensors", tensors, {**metadata, "format": 7})
    with pytest.raises(ModelError, match="is of format 7; this version reads 1"):
        card_of(out / "student.safetensors")
    config = settings(tmp_path / "run", resume=True, extend=True, epochs=2.0)
    config.cache = CacheSettings(plan="all", directory=str(tmp_path / "rows"))
    with pytest.raises(CheckpointError, match=r"is of format 7; this version reads 1"):
        Distiller(config, teacher=network(0), student=network(1)).run(progress=False)
    for path, error in ((out / "events.jsonl", CheckpointError), (out / "results.json", StableKDError)):
        text = path.read_text()
        assert text.count('"format": 1') == 1
        path.write_text(text.replace('"format": 1', '"format": 7'))
        with pytest.raises(error, match="is of format 7; this version reads 1"):
            read_events(out) if path.suffix == ".jsonl" else read_results(path)
    content = (out / "student.safetensors").read_bytes()
    (out / "student.safetensors").write_bytes(content.replace(b"sealed 2 ", b"sealed 7 "))
    with pytest.raises(ModelError, match="its digests are of format 7; this version reads 1 and 2"):
        load_weights(network(9), out / "student.safetensors")
