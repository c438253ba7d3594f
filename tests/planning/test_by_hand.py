"""Costs of other devices and of several ranks, added up by hand. No two numbers are alike."""

import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from stablekd_fast.blocks import pair_blocks
from stablekd_fast.cache.codecs import RowFormat
from stablekd_fast.cache.settings import CacheSettings
from stablekd_fast.cache.speed import measure_tiers
from stablekd_fast.data.batch import Batch
from stablekd_fast.errors import ConfigError
from stablekd_fast.execution.process import spare_processors
from stablekd_fast.planning import pair, ranks
from stablekd_fast.planning.assign import GroupCost, ReduceCost, best_layout, linear
from stablekd_fast.planning.costs import Planner, _makes_images
from stablekd_fast.planning.pair import PairPlan
from stablekd_fast.planning.profiles import Profile, predicted_blocks

DEVICE = Profile(
    name="d", source="", flops=1e12, memory_bandwidth=4e11, memory_bytes=1e10, link_bandwidth=2e10, disk_read=3e9,
    disk_write=1.5e9, images_per_second=700.0, flops_share=0.5, bandwidth_share=0.8, interconnect_bandwidth=5e10,
    network_bandwidth=1e10, ranks_per_node=4, reduce_latency=2e-5,
)  # fmt: skip


def test_a_block_takes_the_slower_of_arithmetic_and_memory():
    assert DEVICE.block(1e9, 1e6, 3) == pytest.approx(1e9 / 5e11)
    assert DEVICE.block(1e6, 1e6, 3) == pytest.approx(2 * 3 * 1e6 / 3.2e11)


def test_an_exchange_of_gradients():
    assert DEVICE.reduce(1).seconds(1000, 1) == 0.0
    within, between = DEVICE.reduce(4), DEVICE.reduce(5)
    assert within.seconds(6_000_000, 3) == pytest.approx(2e-5 + 6e6 * 2 * 2 / 3 / (5e10 * 0.8))
    assert between.seconds(6_000_000, 3) == pytest.approx(2e-5 + 6e6 * 2 * 2 / 3 / (1e10 * 0.8))
    assert ReduceCost.sent(1200, 2) == 1200 and ReduceCost.sent(1200, 4) == 1800


def test_tiers_of_a_device():
    tiers = DEVICE.tiers({"device": 1e12, "host": 5e9, "disk": 0})
    assert set(tiers) == {"device", "host"}
    assert tiers["device"].budget == 8e9 and tiers["host"].budget == 5e9
    assert tiers["device"].read == tiers["device"].write == {"device": pytest.approx(2 / 3.2e11)}
    assert tiers["host"].read == {"link": pytest.approx(1 / 2e10)}
    disk = DEVICE.tiers({"device": 0, "host": 0, "disk": 7.0})["disk"]
    assert disk.read == {"disk": pytest.approx(1 / 3e9), "link": pytest.approx(1 / 2e10)}
    assert disk.write == {"disk": pytest.approx(1 / 1.5e9), "link": pytest.approx(1 / 2e10)} and disk.budget == 7.0
    assert DEVICE.tiers({"device": 3e9, "host": 0, "disk": 0})["device"].budget == 3e9


def test_a_codec_passes_over_the_values_in_each_width():
    example = torch.zeros(2, 16, 4, 4)
    exact, coarse = (DEVICE.codec(RowFormat.of(codec, example), 10) for codec in ("fp32", "int8"))
    assert (exact.row_bytes, exact.encode, exact.decode, exact.exact) == (1024, 0.0, 0.0, True)
    assert coarse.row_bytes == 256 + 4 * 16 and not coarse.exact
    assert coarse.encode == coarse.decode == pytest.approx((10240 + 3200) / 3.2e11)


def test_predicted_blocks_of_a_pair():
    """Per image and multiply-add two operations; a step is three passes of arithmetic, and four of its output."""
    torch.manual_seed(0)
    nets = [
        nn.Sequential(
            nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU()), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(width, 10),
        )
        for width in (32, 16)
    ]  # fmt: skip
    paired = pair_blocks(nets[0].eval(), nets[1], torch.randn(2, 3, 8, 8), cuts=["0"])
    teacher, student = predicted_blocks(DEVICE, paired, 50)
    assert paired.teacher_flops == [2 * 27 * 32 * 64, 2 * 320] and paired.student_flops == [2 * 27 * 16 * 64, 2 * 160]
    size = 50 * 16 * 64 * 4
    assert teacher[1] == pytest.approx(2 * 320 * 50 / 5e11)
    assert teacher[0] == pytest.approx(DEVICE.block(paired.teacher_flops[0] * 50, 2 * size, 2))
    assert len(teacher) == 2 and list(student) == ["1", "2"]
    forward = max(paired.student_flops[0] * 50 / 5e11, 2 * 2 * size / 3.2e11)  # two layers store and read
    assert student["1"] == pytest.approx(3 * forward + 4 * size / 3.2e11)
    assert student["2"] == pytest.approx(3 * 2 * 160 * 50 / 5e11)


def test_two_measured_points_make_a_line():
    seconds = linear((10, 0.030), (50, 0.110))
    assert [seconds(images) for images in (0, 10, 30, 50, 100)] == pytest.approx([0.010, 0.030, 0.070, 0.110, 0.210])
    through_zero = linear((50, 0.2), (50, 0.2))
    assert through_zero(25) == pytest.approx(0.1)
    noisy = linear((10, 0.030), (50, 0.020))
    assert noisy(10) == noisy(100) == pytest.approx(0.020), "more images take no less"
    steep = linear((10, 0.001), (20, 0.1))
    assert steep(20) == pytest.approx(0.0099 * 20), "nothing takes no time below zero"


def constant(seconds):
    return lambda images: seconds * images


GROUPS = [GroupCost(constant(s), constant(t), size, {k: 1e-4}) for k, (s, t, size) in enumerate(
    [(0.001, 0.010, 1000), (0.002, 0.020, 2000), (0.004, 0.040, 4000), (0.008, 0.080, 8000)]
)]  # fmt: skip


def test_layouts_take_what_a_hand_computes():
    """Groups of 1, 2, 4 and 8 ms an image, and 0.1 ms to read what each is fed; batches of 12."""
    reduce = ReduceCost(latency=0.0005, per_byte=1e-6)
    cached = best_layout(GROUPS, 2, 12, reduce, axis="blocks")
    assert (cached.blocks, cached.data) == (2, 1) and not cached.hands_on
    assert sorted(cached.seconds) == pytest.approx([12 * 0.0073, 12 * 0.0081])
    divided = best_layout(GROUPS, 2, 12, reduce, axis="data")
    exchanged = 4 * 0.0005 + 1e-6 * 15_000
    assert (divided.blocks, divided.data) == (1, 2)
    assert divided.seconds == (pytest.approx(6 * 0.0154 + exchanged),)
    live = best_layout(GROUPS, 2, 12, reduce, axis="blocks", live=True)
    assert live.places == (0, 0, 0, 1) and live.hands_on
    assert live.seconds == pytest.approx((12 * 0.077, 12 * 0.088))
    three = best_layout(GROUPS, 3, 12, reduce, axis="blocks", live=True)
    assert three.places == (0, 0, 1, 2) and three.seconds == pytest.approx((12 * 0.033, 12 * 0.044, 12 * 0.088))
    slow_loader = best_layout(GROUPS, 2, 12, reduce, image_seconds=0.1)
    assert slow_loader.data == 2, "each rank loads a half"
    assert best_layout(GROUPS, 2, 12, reduce).data == 1, "images cost nothing unless something is said of them"


def test_what_cannot_be_planned_is_refused():
    assert PairPlan(teacher="resnet56", student="resnet20", ranks=1).ranks == 1
    assert PairPlan(teacher="resnet56", student="resnet20").ranks is None
    for count in (0, -2):
        with pytest.raises(ConfigError, match="ranks"):
            PairPlan(teacher="resnet56", student="resnet20", ranks=count)
    with pytest.raises(ConfigError, match="states no interconnect_bandwidth"):
        Profile(**{**vars(DEVICE), "interconnect_bandwidth": 0.0}).reduce(2)


def test_a_run_shows_the_views_of_all_its_stages():
    """Three stages that end after 40, 60 and 250 steps of 100 an epoch."""
    stages = [SimpleNamespace(last=last) for last in (40, 60, 250)]
    for views, shown in ((4, 3), (2, 2), (None, 3)):
        source = SimpleNamespace(views=views, steps_per_epoch=100)
        assert Planner(None, source, None, stages, None, torch.device("cpu")).views == shown


@pytest.mark.parametrize("spare", [False, True])
def test_what_threads_read_costs_training_something_where_they_share_its_processors(tmp_path, monkeypatch, spare):
    """On a CPU there is no second stream: images and rows are read ahead by threads."""
    count = len(os.sched_getaffinity(0))
    monkeypatch.setattr(torch, "get_num_threads", lambda: count - 1 if spare else count)
    assert spare_processors() is spare
    settings = CacheSettings(directory=str(tmp_path), disk_budget="1GB")
    disk = measure_tiers(settings, torch.randn(4, 8), 4096, torch.device("cpu"))["disk"]
    assert set(disk.read) == ({"disk"} if spare else {"disk", "device"}) and set(disk.write) == {"device"}
    for resident, device, maker in (
        (True, "cpu", "device"), (True, "cuda", "device"), (False, "cuda", "loader"),
        (False, "cpu", "loader" if spare else "device"),
    ):  # fmt: skip
        source = SimpleNamespace(split=SimpleNamespace(resident=resident), device=torch.device(device))
        assert _makes_images(source) == maker


def test_decoded_images_are_copied_over_the_link_too():
    """A batch of 64 images of 32 x 32 bytes in three colours, over 20 GB/s; the loader makes 700 a second."""
    asked = PairPlan("resnet8", "resnet8", image_size=32, batch_size=64, epochs=1, budget_host="1GB")
    paired = asked.paired()
    with_profile = replace(asked, device_profile="d")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pair, "profile", lambda name: DEVICE)
        costs, _ = pair._costs(with_profile, paired, asked.settings(""))
    assert costs.images == {"loader": pytest.approx(64 / 700), "link": pytest.approx(64 * 3 * 32 * 32 / 2e10)}


def test_costs_of_groups_are_lines_through_a_part_and_the_whole_of_a_batch(monkeypatch):
    """Two ranks, whose clocks say that the student's block takes 1 + 2n, the teacher's 3 + 5n seconds for n images; on
    the other rank everything takes twice as long."""
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2)) for _ in range(2)]
    paired = pair_blocks(nets[0].eval(), nets[1], torch.randn(2, 3, 8, 8), cuts=["0"])
    monkeypatch.setattr(
        ranks, "measure_students",
        lambda paired, objectives, groupings, batch, device, capture: {"1": 1 + 2 * len(batch.labels), "2": 0.5},
    )  # fmt: skip
    monkeypatch.setattr(ranks, "measure_teacher", lambda paired, images, capture: [3 + 5 * len(images), 0.25])
    doubled = lambda told: (  # noqa: E731
        [{name: 2 * seconds for name, seconds in one.items()} for one in told[0]],
        [[2 * seconds for seconds in one] for one in told[1]],
        {},
    )
    together = SimpleNamespace(size=2, all_gather=lambda told: [told, doubled(told)])
    batch = Batch(torch.arange(12), 0, torch.randn(12, 3, 8, 8), torch.zeros(12, dtype=torch.int64))
    reads = SimpleNamespace(teacher_outputs=lambda groups, cuts: frozenset())
    [[first, last]] = ranks._measured_groups(paired, reads, [[[0], [1]]], batch, {}, together, torch.device("cpu"))
    assert first.student(10) == pytest.approx(1.5 * 21) and first.teacher(10) == pytest.approx(1.5 * 53)
    assert first.student(4) == pytest.approx(1.5 * 9) and first.teacher(4) == pytest.approx(1.5 * 23)
    assert last.student(7) == pytest.approx(0.75) and last.teacher(7) == pytest.approx(0.375)
