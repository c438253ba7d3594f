"""`bench step` in small: every contender is checked, wrong ones show no speed, profiles name every phase."""

import dataclasses
import json

import pytest
import torch

from stablekd_fast.bench.core import WrongResult, check, measure
from stablekd_fast.bench.peak import count_flops
from stablekd_fast.bench.runs.loops import OrdinaryBlockwise
from stablekd_fast.bench.runs.profile import profile_step
from stablekd_fast.bench.runs.step import Contest, Operations, compile_cost, overhead, step_case
from stablekd_fast.bench.runs.teacher import Pair
from stablekd_fast.bench.runs.unavoidable import ARITHMETIC, NAME, moved, unavoidable
from stablekd_fast.cli import main
from stablekd_fast.data import open_dataset
from stablekd_fast.execution.precision import cpu_has_bf16

TINY = Pair("resnet32", "resnet20", 8, 16, batches=2)


@pytest.fixture(scope="module")
def digits():
    return open_dataset("digits")


@pytest.fixture(scope="module")
def made(tmp_path_factory, digits):
    """The case and our arms."""
    return step_case(TINY, digits, tmp_path_factory.mktemp("rows"), compiled=False)


def test_every_contender_gives_the_losses_of_float64_and_is_timed(made):
    case, arms = made
    rows = measure(case, 1)
    names = {row["contender"] for row in rows}
    assert {"KD loop", "torchdistill KD", "blockwise, prefix run again", "ours, relay", "ours, cache"} <= names
    assert {"student without a teacher", "student without a teacher, channels-last", NAME} <= names
    for name in ("ours, cache, bf16", "student without a teacher, channels-last, bf16", f"{NAME}, bf16"):
        assert (name in names) == cpu_has_bf16()
    assert all(row["median_seconds"] > 0 for row in rows)
    assert set(arms) <= names
    by_name = {row["contender"]: row for row in rows}
    assert by_name["ours, cache"]["limit"] == "peak, fp32" and by_name["ours, cache"]["limit_seconds"] > 0
    assert not cpu_has_bf16() or by_name["ours, cache, bf16"]["limit"] == "peak, bf16"
    beside = overhead([{**row, "median_seconds": 2.0 if row["contender"] == "ours, cache" else 1.0} for row in rows])
    assert beside["step_ms"] == 2000 and beside["operations_ms"] == 1000


def test_operations_are_counted(made):
    flops = {contender.name: contender.flops for contender in made[0].contenders}
    alone = next(contender for contender in made[0].contenders if contender.name == "ours, operations alone")
    assert flops["ours, cache"] == count_flops(alone.call), "those of the students, and no others"
    assert flops["ours, relay"] < flops["blockwise, prefix run again"], "no prefix is run twice"
    assert flops["KD loop"] == flops["torchdistill KD"] > flops["ours, relay"] - flops["ours, cache"]
    assert flops[NAME] == flops["ours, cache"], "all arithmetic of the step, and no other"
    assert flops["KD loop"] > flops["student without a teacher"] > flops["ours, cache"], "images need no gradient"


@pytest.mark.parametrize(
    "name",
    ["KD loop", "torchdistill KD", "blockwise, prefix run again", "student without a teacher", "ours, cache"],
)
def test_a_contender_that_computes_something_else_shows_no_speed(made, name):
    (contender,) = [contender for contender in made[0].contenders if contender.name == name]
    alone, loop = dataclasses.replace(made[0], contenders=[contender]), contender.call.__self__
    student = (
        loop.box.student_model if name == "torchdistill KD" else getattr(loop, "student", None) or loop.paired.student
    )
    check(alone)
    bias = list(student.parameters())[-1].detach()
    bias[3] += 1
    with pytest.raises(WrongResult, match=f": {name}"):
        check(alone)
    bias[3] -= 1


def test_the_operations_alone_are_the_networks_and_the_losses(tmp_path, digits):
    alone = Operations(Contest(TINY, digits, tmp_path).ours())
    names = [operation.function._opname for operation in alone.calls]
    convolutions = 19
    assert names.count("convolution") == names.count("convolution_backward") == convolutions
    assert names.count("batch_norm_act") == names.count("batch_norm_act_backward") == convolutions
    assert names.count("feature_mse_with_grad") == 3 and names.count("kd_loss_with_grad") == 1
    assert not any("foreach" in name or "copy" in name for name in names), names


def test_the_limit_moves_what_the_other_operations_read_and_write(tmp_path, digits):
    calls = Operations(Contest(TINY, digits, tmp_path).ours()).calls
    others = [call for call in calls if call.function._opname not in ARITHMETIC]
    norms = [call for call in others if call.function._opname == "batch_norm_act"]
    maps = 4 * 16 * (7 * 16 * 8 * 8 + 6 * 32 * 4 * 4 + 6 * 64 * 2 * 2)
    read, written = moved(norms)
    added = 4 * 16 * (3 * 16 * 8 * 8 + 3 * 32 * 4 * 4 + 3 * 64 * 2 * 2)
    assert maps + added <= read < 1.1 * (maps + added) and maps <= written < 1.1 * maps
    read, written = moved(others)
    assert {one.extras["bytes_moved"] for one in unavoidable(calls, "fp32", 1e-4)} == {read + written}


def test_a_limit_that_computes_something_else_shows_no_speed(made):
    contender = next(contender for contender in made[0].contenders if contender.name == NAME)
    check(dataclasses.replace(made[0], contenders=[contender]))
    wrong = dataclasses.replace(contender, call=lambda: contender.call() + 1)
    with pytest.raises(WrongResult, match=NAME):
        check(dataclasses.replace(made[0], contenders=[wrong]))


def test_blockwise_runs_every_prefix_again(tmp_path, digits):
    loop, ran = Contest(TINY, digits, tmp_path).rival(OrdinaryBlockwise), []
    for k, block in enumerate(loop.paired.teacher_blocks):
        block.register_forward_hook(lambda *_, k=k: ran.append(k))
    loop.train()
    assert ran == [0, 0, 1, 0, 1, 2, 0, 1, 2, 3]


def test_compiling_is_made_up_for_by_what_it_gains():
    class First:
        def losses(self):
            torch.ones(1).sum()

    rows = [
        {"contender": "ours, cache", "median_seconds": 0.2, "images": 100},
        {"contender": "ours, cache, compiled", "median_seconds": 0.1, "images": 100},
        {"contender": "ours, cache, bf16", "median_seconds": 0.1, "images": 100},
        {"contender": "ours, cache, bf16, compiled", "median_seconds": 0.1, "images": 100},
    ]
    faster, same = compile_cost({row["contender"]: First() for row in rows}, rows)
    assert faster["made_up_after_epochs"] == pytest.approx(faster["first_step_seconds"] / 0.1 / 500)
    assert same["made_up_after_epochs"] is None


def test_a_profile_has_every_block_and_phase(tmp_path, digits):
    rows = profile_step(TINY, digits, tmp_path, tmp_path / "trace.json", steps=2)
    assert [row["block"] for row in rows] == ["1", "2", "3", "4", "all"]
    for row in rows[:-1]:
        assert all(row[phase] > 0 for phase in ("forward", "loss", "backward", "update"))
    assert rows[-1]["copy"] > 0
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {"forward, block 1", "backward, block 4", "copy"} <= {event.get("name") for event in events}


def test_the_command_asks_for_images(tmp_path, capsys):
    assert main(["bench", "step", "--directory", str(tmp_path)]) == 2
    assert "No images were given" in capsys.readouterr().err
