"""`--deterministic`: what it sets, refuses, and puts back."""

import os

import pytest
import torch

from stablekd_fast.cli import main
from stablekd_fast.engine.checkpoint import load_tensors
from stablekd_fast.errors import ConfigError, TrainingError
from stablekd_fast.execution.process import deterministic

CPU, GPU = torch.device("cpu"), torch.device("cuda:1")


def settings():
    cudnn = torch.backends.cudnn
    workspaces = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    return torch.get_deterministic_debug_mode(), cudnn.deterministic, cudnn.benchmark, workspaces


@pytest.mark.parametrize("before", [(0, False, True), (1, True, False)])
@pytest.mark.parametrize("ends", ["well", "in an error"])
def test_what_was_set_for_determinism_comes_back(monkeypatch, before, ends):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    cudnn, mode = torch.backends.cudnn, torch.get_deterministic_debug_mode()
    monkeypatch.setattr(cudnn, "deterministic", before[1])
    monkeypatch.setattr(cudnn, "benchmark", before[2])
    torch.set_deterministic_debug_mode(before[0])
    try:
        start = settings()
        try:
            with deterministic(GPU):
                assert settings() == (2, True, False, ":4096:8")
                if ends == "in an error":
                    raise KeyError
        except KeyError:
            pass
        assert settings() == start
        with deterministic(GPU, wanted=False):
            assert settings() == start
    finally:
        torch.set_deterministic_debug_mode(mode)


def test_a_workspace_that_lets_cublas_add_in_any_order_is_refused(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(ConfigError, match="CUBLAS_WORKSPACE_CONFIG=:0:0 lets cuBLAS add in any order; unset it"):
        with deterministic(GPU):
            pass
    with deterministic(CPU):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":0:0"


def test_an_operation_without_a_deterministic_form_is_named():
    values, places = torch.nn.functional.max_pool2d(torch.rand(1, 1, 4, 4), 2, return_indices=True)
    with pytest.raises(TrainingError, match="deterministic=true was given, but max_unpool.* does not have a determin"):
        with deterministic(CPU):
            torch.nn.functional.max_unpool2d(values, places, 2)
    with pytest.raises(RuntimeError, match="shape") as other:
        with deterministic(CPU):
            torch.zeros(3).view(2)
    assert not isinstance(other.value, TrainingError)


RUN = [
    "distill",
    "--method",
    "ce",
    "--student",
    "resnet20",
    "--subset",
    "96",
    "--validation",
    "0",
    "--batch-size",
    "16",
]
RUN += ["--bn-images", "32", "--device", "cpu", "--evaluate-every", "0", "--precision", "fp32"]


def test_a_deterministic_run_repeats_itself_and_goes_on_only_as_one(tmp_path, capsys):
    for name in ("one", "other"):
        assert main([*RUN, "--epochs", "1", "--deterministic", "true", "--out", str(tmp_path / name)]) == 0
    one, other = (load_tensors(tmp_path / name / "student.safetensors")[0] for name in ("one", "other"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.get_deterministic_debug_mode() == 0
    assert main([*RUN, "--epochs", "2", "--out", str(tmp_path / "one"), "--resume"]) == 2
    assert "deterministic: was True, is False" in capsys.readouterr().err
