"""`bench budget`: what is counted agrees with what a GPU launched; predictions are the arithmetic that they show."""

import json
from collections import Counter
from dataclasses import replace
from statistics import median
from types import SimpleNamespace

import pytest
import torch

from stablekd_fast.bench.runs.budget import (
    BYTES,
    KERNELS,
    Question,
    _beside,
    _one_by_one,
    arithmetic,
    predicted,
    ways_of,
)
from stablekd_fast.bench.runs.budget_steps import (
    FED_BY,
    LIVE,
    Counted,
    Profiled,
    Steps,
    Way,
    counted,
    host_seconds,
    of_device,
    profiled,
)
from stablekd_fast.bench.standin import Shipment
from stablekd_fast.bench.standin.kernel_table import KINDS, Work
from stablekd_fast.cache.columns import Kept, Plan
from stablekd_fast.cache.speed import CodecCost
from stablekd_fast.cli import main
from stablekd_fast.planning.profiles import Profile, profile
from stablekd_fast.planning.rows import Costs, OutputCost, StageCost, predict

CPU = torch.device("cpu")
APART = [[0], [1], [2], [3]]
H100 = {LIVE: 313, "rows on the device": 258, "rows in main memory": 254}
"""Kernels and copies of a step that an H100 launched, as docs/results/gpu/kernels-of-a-joined-step.txt lists them. A
step has 24 fewer since: SGD is fused, and rates and losses take fewer operations."""
TINY = Question("resnet20", "resnet20_half", 16, 8)


@pytest.fixture(scope="module")
def real():
    """The steps of which the H100's were listed."""
    ways = [Way(APART, fed_by) for fed_by in FED_BY]
    return dict(zip(FED_BY, counted(Question("resnet56", "resnet20", optimizer="sgd").steps(CPU), ways)))


@pytest.mark.parametrize("fed_by", FED_BY)
def test_as_many_kernels_are_counted_as_a_gpu_launched(real, fed_by):
    kernels = sum(work.kernels for work in real[fed_by].work)
    assert kernels == pytest.approx(H100[fed_by], rel=0.1)


def test_kernels_that_the_listing_names_are_counted_one_by_one(real):
    kinds = Counter()
    for work in real["rows on the device"].work:
        kinds[work.kind] += work.kernels
    assert kinds["optimizer"] == 4, "one for each group"
    assert kinds["norms"] == 0 and kinds["ours"] == 19 * 4 + 4 * 3 + 2, "two forward, two backward; losses"


def test_rows_are_shipped_from_where_they_lie(real):
    def shipped(fed_by):
        return sum(size for way, size in real[fed_by].shipments.items() if way.to_device)

    maps = 2 * (16 * 32 * 32 + 32 * 16 * 16 + 64 * 8 * 8)
    assert shipped("rows in main memory") == 128 * (maps + 2 * 10)  # all of them fill whole pieces of 512 bytes
    assert shipped("rows on the device") < 8192 and shipped(LIVE) == 0
    assert [real[fed_by].columns for fed_by in FED_BY] == [0, 4, 4]
    to_device = [sum(count for way, count in real[fed_by].copies.items() if way.to_device) for fed_by in FED_BY]
    assert dict(zip(FED_BY, to_device))["rows in main memory"] == 1, "four columns in one copy"


def test_a_cache_spares_the_teacher_s_arithmetic(real):
    flops = {fed_by: sum(work.flops for work in real[fed_by].work) for fed_by in FED_BY}
    assert flops["rows on the device"] == flops["rows in main memory"] < 0.6 * flops[LIVE]


def test_all_but_the_filling_of_inputs_is_captured(real):
    """Rows, images, labels; with the live teacher its images too. Rows in main memory are shipped as one."""
    assert {fed_by: found.outside for fed_by, found in real.items()} == {
        LIVE: 1 + 2 + 4,
        "rows on the device": 4 + 4 + 2,
        "rows in main memory": 1 + 4 + 2,
    }


class Mixed(Steps):
    """Steps whose first two outputs are rows; the others the live teacher computes from there."""

    def _teacher(self, way, batches, device):
        teacher = super()._teacher(way, batches, device)
        teacher.columns = {k: teacher.columns[k] for k in (0, 1)}
        return teacher


@pytest.fixture(scope="module")
def mixed():
    steps = Question("resnet56", "resnet20", optimizer="sgd").steps(CPU)
    return counted(Mixed(**vars(steps)), [Way(APART, "rows in main memory")])[0]


@pytest.mark.parametrize("gigabytes", [50, 4])
@pytest.mark.parametrize("fed_by", [LIVE, "rows in main memory", "mixed"])
def test_the_planner_adds_up_what_streams_were_counted_to_do(real, mixed, fed_by, gigabytes):
    """The link is fast enough to hide behind the step, and too slow for that."""
    device = replace(profile("h100"), link_bandwidth=1e9 * gigabytes)
    found = mixed if fed_by == "mixed" else real[fed_by]
    ahead = _one_by_one(found.beside, device)
    student = _one_by_one(found.work, device) - ahead
    shipped = sum(size for way, size in found.shipments.items() if way.to_device and way.apart)
    outputs = (
        OutputCost("rows", 1.0, {"fp32": CodecCost(shipped // 128, 0.0, 0.0)}),
        OutputCost("computed", ahead, {}),
    )
    wanted = frozenset({1} if fed_by == LIVE else {0, 1})
    outputs = (replace(outputs[0], block=0.0), outputs[1]) if fed_by == LIVE else outputs
    tiers = device.tiers({"device": 0, "host": 1e12, "disk": 0})
    costs = Costs(outputs, (StageCost(student, wanted, 1, 0),), tiers, {}, 128, 128)
    kept = Plan() if fed_by == LIVE else Plan({0: Kept("host", "fp32")})
    expected = predicted(found, device)["one_after_the_other"]
    assert 1e3 * predict(costs, kept).seconds == pytest.approx(expected, rel=1e-3)
    kinds = Counter(work.kind for work in found.beside)
    assert (kinds["convolutions"] > 10) == (fed_by != "rows in main memory"), "the teacher's pass is beside the step"
    others = [_one_by_one(one.work, device) - _one_by_one(one.beside, device) for one in (*real.values(), mixed)]
    assert max(others) < 1.05 * min(others), "and the step is the same, whatever feeds it"


def test_what_a_step_takes_of_the_host_is_measured_with_copies_that_do_nothing(monkeypatch):
    from stablekd_fast.bench.runs import budget_steps

    took, nothing = [], []
    seconds = budget_steps._seconds

    def timed(arm):
        image = torch.zeros(3, 2)
        image.copy_(torch.ones(3, 2))
        nothing.append(not image.any() and len(image.index_select(0, torch.tensor([0, 2]))) == 2)
        took.append(seconds(arm))
        return took[-1]

    monkeypatch.setattr(budget_steps, "_seconds", timed)
    steps = TINY.steps(CPU)
    groups = ways_of(len(steps.paired))[0].groups
    found = host_seconds(steps, [Way(groups, LIVE), Way(groups, "rows in main memory")])
    half = len(took) // 2
    assert found == [median(took[:half]), median(took[half:])] and min(took) > 0
    assert all(nothing)
    x = torch.zeros(2)
    assert torch.equal(x.copy_(torch.ones(2)), torch.ones(2)), "copies copy again"


def test_stages_merge_until_one_group_is_left():
    assert [way.stage for way in ways_of(4)[:: len(FED_BY)]] == ["1|2|3|4", "1+2|3+4", "1+2+3+4"]


SPEEDS = {"flops": 0.5e12, "memory_bandwidth": 1e12, "link_bandwidth": 1e9, "disk_read": 1, "disk_write": 1}
SHARES = {"flops_share": 0.5, "bandwidth_share": 0.5, "memory_bytes": 1e9, "images_per_second": 1}
DEVICE = Profile("one", "made up", **SPEEDS, **SHARES, kernel_seconds=1e-6)
"""0.5 TB/s, and 0.5 TFLOP/s in bf16."""


@pytest.mark.parametrize(
    "apart, at_least, one_by_one", [(False, 0.002 + 0.005, 0.001 + 0.002 + 0.001 + 0.005), (True, 0.005, 0.005)]
)
def test_predictions_are_limits_by_hand(apart, at_least, one_by_one):
    work = [Work("copies", 1000, 1_000), Work("copies", 1, 1_000_000_000), Work("products", 1, 0, 500_000_000)]
    found = Counted(work, Counter({Shipment(True, True, apart): 5_000_000}), Counter(), 0, 0)
    row = predicted(found, DEVICE)
    assert row["launches"] == pytest.approx(1.002) and row["memory"] == pytest.approx(2, rel=1e-3)
    assert row["arithmetic"] == pytest.approx(1) and row["link"] == pytest.approx(5)
    assert row["at_least"] == pytest.approx(1e3 * at_least, rel=1e-3)
    assert row["one_after_the_other"] == pytest.approx(1e3 * one_by_one, rel=1e-3)


def test_the_next_batch_is_copied_and_then_computed_beside_the_step():
    """5 ms of copies and 1 ms of work make the next batch ready; the step has 3 ms of its own, the device 4 in all."""
    ahead = [Work("products", 1, 0, 500_000_000)]
    found = Counted(
        [Work("copies", 1, 1_500_000_000), *ahead], Counter({Shipment(True, True, True): 5_000_000}), Counter(), 0, 0,
        ahead,
    )  # fmt: skip
    row = predicted(found, DEVICE)
    assert row["at_least"] == pytest.approx(6, rel=1e-3) and row["one_after_the_other"] == pytest.approx(6, rel=1e-3)
    assert "or beside it 5.00 ms of copies, then 1.00 ms of work: 6.00 ms" in arithmetic(found, DEVICE)
    found.shipments.clear()
    assert predicted(found, DEVICE)["one_after_the_other"] == pytest.approx(4, rel=1e-3)


def test_the_line_shows_the_arithmetic():
    found = Counted([Work("copies", 3, 500_000_000, 1_000_000_000)], Counter(), Counter(), 0, 0)
    assert arithmetic(found, DEVICE) == (
        "max(3 kernels x 1 us = 0.00 ms, 500 MB / 500 GB/s = 1.00 ms, 1.0 GFLOP / 0 TFLOP/s = 2.00 ms): 2.00 ms, "
        "predicted, not measured"
    )


def test_what_people_named_is_no_kernel():
    def event(name, kind, microseconds, named=False):
        elapsed = SimpleNamespace(elapsed_us=lambda: microseconds)
        return SimpleNamespace(name=name, device_type=kind, time_range=elapsed, is_user_annotation=named)

    cuda, host = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    events = [event("gemm", cuda, 30), event("gemm", cuda, 30), event("aten::mm", host, 99),
              event("step", cuda, 60, named=True), event("Optimizer.step#SGD.step", cuda, 60)]  # fmt: skip
    found = of_device(events, 1e-4, steps=2)
    assert found.kernels == 1 and found.busy_seconds == pytest.approx(30e-6) and found.step_seconds == 1e-4


def test_what_a_gpu_did_stands_beside_what_was_counted():
    found = Counted([Work("copies", 90, 0), Work("norms", 9, 0)], Counter(), Counter(), 0, 0)
    row = _beside(Way(APART, LIVE), found, Profiled(kernels=110.0, busy_seconds=2e-3, step_seconds=3e-3))
    assert (row["stage"], row["fed_by"]) == ("1|2|3|4", LIVE)
    assert (row["counted"], row["measured"], row["device_ms"], row["step_ms"]) == (99, 110.0, 2.0, 3.0)
    assert row["counted_over_measured"] == pytest.approx(0.9)


def test_the_command_keeps_what_it_counted(tmp_path, capsys):
    words = ["--teacher", "resnet20", "--student", "resnet20_half", "--image-size", "16", "--batch-size", "8"]
    assert main(["bench", "budget", *words, "--json", str(tmp_path / "budget.json")]) == 0
    tables = json.loads((tmp_path / "budget.json").read_text())["tables"]
    assert len(tables[KERNELS]) == len(tables[BYTES]) == len(ways_of(len(TINY.steps(CPU).paired)))
    for row in tables[KERNELS]:
        assert row["all"] == sum(row[kind] for kind in KINDS)
    assert "predicted, not measured" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, said",
    [
        (["--batch-size", "0"], "batch_size=0 was given"),
        (["--device-profile", "h1000"], "no device profile 'h1000'"),
    ],
)
def test_what_makes_no_sense_is_said(words, said, capsys):
    assert main(["bench", "budget", "--teacher", "resnet20", "--student", "resnet20_half", *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.gpu
def test_as_many_kernels_are_counted_as_this_gpu_launches(real):
    gpu = torch.device("cuda", torch.cuda.current_device())
    ways = [Way(APART, fed_by) for fed_by in FED_BY]
    steps = Question("resnet56", "resnet20", optimizer="sgd").steps(gpu)
    for way, measured in zip(ways, profiled(steps, ways, gpu)):
        kernels = sum(work.kernels for work in real[way.fed_by].work)
        assert kernels == pytest.approx(measured.kernels, rel=0.1), way
        assert 0 < measured.busy_seconds and 0 < measured.step_seconds
