"""The whole engine on a GPU, wherever one is found: `pytest -m gpu`."""

import json

import pytest
import torch

from stablekd_fast.cli import main
from stablekd_fast.engine.checkpoint import load_tensors

pytestmark = pytest.mark.gpu

SMALL = ["--subset", "192", "--validation", "32", "--batch-size", "32", "--bn-images", "64", "--log-every", "1"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    out = tmp_path_factory.mktemp("teacher") / "run"
    words = ["distill", "--method", "ce", "--student", "resnet20", *SMALL, "--epochs", "2", "--device", "cuda"]
    assert main([*words, "--out", str(out)]) == 0
    return out / "student.safetensors"


def distil(teacher, out, device, *words):
    command = ["distill", "--teacher", "resnet20", "--teacher-weights", str(teacher), "--student", "resnet20", *SMALL]
    assert main([*command, "--epochs", "3", "--device", device, "--out", str(out), *words]) == 0
    events = map(json.loads, (out / "events.jsonl").open())
    return [event["losses"] for event in events if event["kind"] == "train"]


def test_the_loss_curve_is_the_cpu_s(teacher, tmp_path):
    """The first steps agree closely; later ones drift apart, as float32 training does."""
    on_gpu, on_cpu = (distil(teacher, tmp_path / device, device) for device in ("cuda", "cpu"))
    assert len(on_gpu) == len(on_cpu) == 18
    for gpu, cpu in zip(on_gpu[:3], on_cpu[:3]):
        assert gpu == pytest.approx(cpu, rel=0.02)
    assert on_gpu[-1] == pytest.approx(on_cpu[-1], rel=0.5)


def test_a_finished_run_resumes_on_the_gpu(teacher, tmp_path):
    distil(teacher, tmp_path / "run", "cuda")
    before = load_tensors(tmp_path / "run" / "checkpoint.safetensors")[0]
    distil(teacher, tmp_path / "run", "cuda", "--resume")
    after = load_tensors(tmp_path / "run" / "checkpoint.safetensors")[0]
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("place", ["--cache.directory=rows", "--cache.host_budget=1GB", "--cache.device_budget=1GB"])
@pytest.mark.parametrize("codec", ["fp32", "int8", "fp8"])
def test_a_cache_is_filled_and_read_on_the_gpu(teacher, tmp_path, monkeypatch, place, codec):
    """The first step sees no stored row; from the second epoch on every row comes from the cache."""
    monkeypatch.chdir(tmp_path)
    words = ["--views", "1", "--cache.plan", "all", place, "--cache.codecs", f"[{codec}]"]
    live, cached = (
        distil(teacher, tmp_path / "live", "cuda", "--views", "1"),
        distil(teacher, tmp_path / "run", "cuda", *words),
    )
    assert cached[0] == pytest.approx(live[0], rel=1e-4 if codec == "fp32" else 0.1)
    assert cached[-1] == pytest.approx(live[-1], rel=0.5)


def test_a_plan_is_measured_on_the_gpu(teacher, tmp_path):
    words = ["--views", "1", "--cache.directory", str(tmp_path / "rows"), "--cache.device_budget", "1GB"]
    distil(teacher, tmp_path / "run", "cuda", *words)
    assert '"cache_plan"' in (tmp_path / "run" / "events.jsonl").read_text()
