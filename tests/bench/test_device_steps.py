"""`bench step --device cuda`, rehearsed on the CPU: every contender computes what float64 does."""

import dataclasses

import pytest
import torch

from stablekd_fast.bench.core import WrongResult, check, measure
from stablekd_fast.bench.runs.device_steps import device_case, run_device_steps
from stablekd_fast.bench.runs.teacher import Images, Pair
from stablekd_fast.cli import main
from stablekd_fast.data import open_dataset

TINY = Pair("resnet14", "resnet8", 8, 16, batches=2)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def case():
    return device_case(TINY, open_dataset("digits"), CPU, compiled=False)


def test_every_contender_gives_the_losses_of_float64_and_is_timed(case):
    names = {row["contender"] for row in measure(case, 1)}
    assert {"KD loop", "KD loop, bf16", "student without a teacher, bf16", "ours, kd", "ours, relay"} <= names
    assert {"ours, cache on the device", "ours, cache in main memory", "ours, cache in main memory, int8"} <= names


@pytest.mark.parametrize("name", ["KD loop", "student without a teacher, bf16", "blockwise, prefix run again, bf16"])
def test_a_loop_that_computes_something_else_shows_no_speed(case, name):
    (contender,) = [contender for contender in case.contenders if contender.name == name]
    loop = contender.call.__self__
    student = loop.paired.student if hasattr(loop, "paired") else loop.student
    weights = list(student.parameters())[-2]
    before = weights.detach().clone()
    with torch.no_grad():
        weights.copy_(weights.flip(0) + torch.randn_like(weights))
    try:
        with pytest.raises(WrongResult, match="is wrong"):
            check(dataclasses.replace(case, contenders=[contender]))
    finally:
        with torch.no_grad():
            weights.copy_(before)


@pytest.mark.gpu
def test_steps_are_measured_on_the_gpu():
    """With loops as one CUDA graph."""
    case = device_case(TINY, open_dataset("digits"), torch.device("cuda"), compiled=False)
    names = {row["contender"] for row in measure(case, 1, device="cuda")}
    assert {"KD loop, bf16, CUDA graph", "student without a teacher, bf16, CUDA graph", "ours, relay, eager"} <= names


def test_pairs_are_those_of_the_images_that_are_given(monkeypatch):
    made = []
    monkeypatch.setattr("stablekd_fast.bench.runs.device_steps.device_case", lambda *given: made.append(given))
    monkeypatch.setattr("stablekd_fast.bench.runs.device_steps.measure", lambda *_, **__: [])
    run_device_steps(Images("digits", None), CPU, 1, False, lambda rows: None)
    assert [(given[0].teacher, given[2], given[3]) for given in made] == [("resnet56", CPU, False)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said(capsys):
    assert main(["bench", "step", "--device", "cuda", "--small", "digits"]) == 2
    assert "cuda" in capsys.readouterr().err
