"""Whole runs with a cache: the same bits as without one, and no teacher where its rows are stored."""

import json
import os
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from stablekd_fast.cache.columns import Columns
from stablekd_fast.cache.settings import CacheSettings
from stablekd_fast.cache.store import RowStore
from stablekd_fast.config import DistillConfig
from stablekd_fast.data import open_dataset
from stablekd_fast.data.crops import BATCHES_AHEAD
from stablekd_fast.data.records import FileRecords
from stablekd_fast.engine import loop
from stablekd_fast.engine.checkpoint import load_tensors, save_run
from stablekd_fast.engine.schedule import Optimizer
from stablekd_fast.errors import CacheError, CheckpointError, ConfigError
from stablekd_fast.run.distiller import Distiller


def net(depth: int, seed: int, widths=(8, 16, 16), classes: int = 10) -> nn.Sequential:
    """Three stages on small images and a classifier."""
    torch.manual_seed(seed)
    stages, inside = [], 3
    for width, stride in zip(widths, (1, 2, 2)):
        layers = [nn.Conv2d(inside, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        for _ in range(depth - 1):
            layers += [nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        stages.append(nn.Sequential(*layers))
        inside = width
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, classes))


@pytest.fixture(scope="module")
def digits():
    return open_dataset("digits")


@pytest.fixture
def run(tmp_path, digits):
    """Train, and count how often each teacher block ran: `run("name", cache=..., epochs=...)`."""

    def start(out: str, *, cache: CacheSettings | None = None, student: nn.Module | None = None, data=None, **settings):
        defaults = {
            "recipe": "progressive", "epochs": 18.0, "subset": 128, "validation": 40, "batch_size": 32,
            "bn_images": 64, "views": 2, "cuts": ["0", "1", "2"], "optimizer": Optimizer(lr=0.01), "device": "cpu",
            "evaluate_every": 0, "precision": "fp32",
        }  # fmt: skip
        config = DistillConfig(out=str(tmp_path / out), cache=cache or CacheSettings(), **{**defaults, **settings})
        data = data or digits
        networks = {
            "teacher": net(2, 1, classes=len(data.classes)),
            "student": student or net(1, 2, classes=len(data.classes)),
        }
        distiller = Distiller(config, dataset=data, **networks)
        ran = [0] * len(distiller.paired)
        for k, block in enumerate(distiller.paired.serving_blocks):
            block.register_forward_hook(lambda *_, k=k: ran.__setitem__(k, ran[k] + 1))
        distiller.run(progress=False)
        tensors, _ = load_tensors(tmp_path / out / "checkpoint.safetensors")
        return {name: value for name, value in tensors.items() if name.startswith("student/")}, ran

    return start


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def disk(tmp_path):
    return lambda **settings: CacheSettings(plan="all", directory=str(tmp_path / "cache"), **settings)


def test_an_exact_cache_gives_the_bits_of_the_live_teacher(run, disk, tmp_path):
    """72 steps: 24 decomposed, 24 half merged, 24 end to end, two views of each image."""
    live, ran_live = run("live")
    filling, ran_filling = run("filling", cache=disk())
    found, ran_found = run("found", cache=disk())
    host, _ = run("host", cache=CacheSettings(plan="all", host_budget="1GB"))
    assert same(live, filling) and same(live, found) and same(live, host)
    probes = 8  # batches on which exposure and the loss at a merge are measured, at two merges
    assert ran_live[0] >= 72 + probes
    assert ran_filling[0] <= 2 * 4 + 8  # each view once, and a few batches with samples left over from earlier epochs
    assert ran_found == [2] * 4  # one batch for the shapes of its outputs, and the held-out images once
    (report,) = (e for e in map(json.loads, open(tmp_path / "found" / "events.jsonl")) if e["kind"] == "cache")
    assert report["live_batches"] == 0 and set(report["rows"].values()) == {256}


class Halved(nn.Module):
    """A residual stage: its sum is rounded to 16 bits only if what comes in has 16 bits."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x):
        return F.relu(self.norm(self.conv(x)) + F.avg_pool2d(x, 2))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_an_exact_cache_gives_the_bits_of_a_teacher_in_16_bits(run, disk, precision):
    def student():
        plain = net(1, 2)
        return nn.Sequential(*plain[:2], Halved(16), *plain[3:])

    live, _ = run("live", student=student(), epochs=6.0, precision=precision)
    filling, _ = run("filling", student=student(), cache=disk(), epochs=6.0, precision=precision)
    found, ran = run("found", student=student(), cache=disk(), epochs=6.0, precision=precision)
    assert same(live, filling) and same(live, found)
    assert ran == [2] * 4


@pytest.mark.parametrize(
    "codecs",
    [{"codecs": ["bf16"]}, {"codecs": ["int8"], "logits": "fp16"}, {"codecs": ["fp8"], "logits": "top5"}],
    ids=str,
)
def test_filling_and_finding_a_cache_give_the_same_bits(run, disk, codecs):
    live, _ = run("live", epochs=6.0)
    filling, _ = run("filling", cache=disk(**codecs), epochs=6.0)
    found, ran = run("found", cache=disk(**codecs), epochs=6.0)
    assert same(filling, found) and not same(live, filling)
    assert ran == [2] * 4
    with pytest.warns(RuntimeWarning, match="is not cached, the live teacher serves instead"):
        no_room, _ = run("no room", cache=CacheSettings(plan="all", host_budget="100kB", **codecs), epochs=6.0)
    assert same(filling, no_room)


def test_a_checkpoint_finds_the_rows_of_all_steps_before_it(run, disk, monkeypatch):
    """Here disks are slow, and every step is saved: what a run that is killed has saved, its resume finds stored."""
    put, saved, stored = RowStore.put, [], []

    def slow(self, rows, parts):
        time.sleep(0.05)
        put(self, rows, parts)
        stored.append(len(rows))

    def seen(parts, state):
        saved.append((state.progress.step, len(stored) // len(parts.teacher.columns)))
        save_run(parts, state)

    monkeypatch.setattr(RowStore, "put", slow)
    monkeypatch.setattr(loop, "save_run", seen)
    run("saving", cache=disk(), epochs=2.0, views=None, checkpoint_every=1)
    assert len(saved) > 3 and [step for step, batches in saved if batches < step] == []


def test_what_no_longer_fits_is_relayed_and_said(run, disk):
    live, _ = run("live", epochs=6.0)
    with pytest.warns(RuntimeWarning, match="cached no further, the live teacher serves.*budget of 500000"):
        small, _ = run("small", cache=disk(disk_budget="500kB"), epochs=6.0)
    assert same(live, small)
    with pytest.warns(RuntimeWarning, match="do not fit into"):
        host, _ = run("host", cache=CacheSettings(plan="all", host_budget="300kB"), epochs=6.0)
    assert same(live, host)


@pytest.mark.parametrize("free", [0, 300_000], ids=["no room at all", "room for some rows"])
def test_a_full_disk_means_relay_and_is_said(run, small_disk, free):
    live, _ = run("live", epochs=6.0)
    (small_disk / "other").write_bytes(bytes((1 << 20) - free))
    with pytest.warns(RuntimeWarning, match="the live teacher serves .*(No space left on device)"):
        full, _ = run("full", cache=CacheSettings(plan="all", directory=str(small_disk / "rows")), epochs=6.0)
    assert same(live, full)


def test_another_student_other_cuts_a_subset_and_more_views_use_the_same_rows(run, disk, tmp_path):
    run("first", cache=disk(), epochs=6.0)
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("shard-*")}
    assert shards
    for name, settings in {
        "student": {"student": net(2, 5)},
        "cuts": {"cuts": ["0", "2"]},
        "subset": {"subset": 96},
        "seed": {"seed": 1, "view_seed": 0},
    }.items():
        _, ran = run(name, cache=disk(), epochs=6.0, **settings)
        # the views are stored but for samples that the short last batch of an epoch left out
        assert max(ran) <= 1 + 2 * 4, (name, ran)
    _, ran = run("views", cache=disk(), epochs=6.0, views=3)
    assert max(ran) <= 1 + 4 + 4
    assert all(path.stat().st_mtime_ns == shards[path] for path in shards)


def test_rows_of_another_teacher_view_or_width_are_refused_or_kept_apart(run, disk, tmp_path, digits):
    run("first", cache=disk(), epochs=2.0)
    with pytest.raises(CacheError, match=r"view.seed: stored 0, now 1.*cache gc"):
        run("seed", cache=disk(), epochs=2.0, seed=1)
    with pytest.raises(CacheError, match=r"batch_size: stored 32, now 16"):
        run("batch", cache=disk(), epochs=2.0, batch_size=16)
    narrow, _ = run("narrow", cache=disk(), epochs=2.0, student=net(1, 3, (4, 8, 16)))
    assert same(narrow, run("narrow live", epochs=2.0, student=net(1, 3, (4, 8, 16)))[0])
    names = {path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()}
    assert {"0.fp32", "1.fp32", "2.fp32", "logits.fp32"} < names and len(names) == 6


def test_a_prefix_is_the_same_whatever_the_cuts_before_it():
    from stablekd_fast.blocks import pair_blocks
    from stablekd_fast.cache.fingerprint import prefix_digests

    teacher, student, images = net(2, 1), net(1, 2), torch.randn(2, 3, 8, 8)
    every = prefix_digests(pair_blocks(teacher, student, images, ["0", "1", "2"]))
    some = prefix_digests(pair_blocks(teacher, net(1, 3), images, ["1"]))
    assert some == [every[1], every[3]]
    with torch.no_grad():
        teacher[1][1].running_mean[0] += 1e-6
    changed = prefix_digests(pair_blocks(teacher, student, images, ["0", "1", "2"]))
    assert changed[0] == every[0] and all(a != b for a, b in zip(changed[1:], every[1:]))
    teacher[0][2] = nn.GELU()
    assert prefix_digests(pair_blocks(teacher, student, images, ["0", "1", "2"]))[0] != every[0]


def test_a_planned_run_reports_its_plan_and_a_resume_keeps_it(run, tmp_path):
    cache = CacheSettings(directory=str(tmp_path / "cache"))
    planned, _ = run("planned", cache=cache, epochs=4.0)
    assert same(planned, run("live", epochs=4.0)[0])  # measuring left no trace
    events = [json.loads(line) for line in open(tmp_path / "planned" / "events.jsonl")]
    (plan,) = [event for event in events if event["kind"] == "cache_plan"]
    assert [row["output"] for row in plan["outputs"]] == ["0", "1", "2", "logits"]
    assert plan["predicted_seconds"] <= plan["predicted_seconds_relay"] * (1 + 1e-9)
    _, metadata = load_tensors(tmp_path / "planned" / "checkpoint.safetensors")
    assert len(metadata["plan"]) == sum(row["decision"].startswith("keep") for row in plan["outputs"])


def test_a_resume_with_an_inexact_cache_is_refused_if_it_was_live(run, disk, tmp_path):
    run("a", cache=disk(codecs=["int8"]), epochs=2.0)
    _, metadata = load_tensors(tmp_path / "a" / "checkpoint.safetensors")
    assert metadata["identity"]["inexact"] == [[0, "int8"], [1, "int8"], [2, "int8"]]
    with pytest.raises(CheckpointError, match="epochs: was 2.0, is 3.0"):
        run("a", cache=disk(codecs=["int8"]), epochs=3.0, resume=True)


def test_all_without_a_place_is_refused(run):
    with pytest.raises(ConfigError, match="cache.plan=all was given, but no place"):
        run("a", cache=CacheSettings(plan="all"))


@pytest.mark.parametrize(
    "altering", [{"mix": "mixup"}, {"mix": "cutmix", "jitter": 0.4}], ids=["mixup", "cutmix and jitter"]
)
def test_altered_images_are_cached_and_refused_under_other_alterations(altering, disk, run):
    plain, _ = run("plain", views=2, **altering)
    filled, _ = run("filled", views=2, cache=disk(), **altering)
    again, _ = run("again", views=2, cache=disk(), **altering)
    assert same(plain, filled) and same(plain, again)
    with pytest.raises(CacheError, match="view"):
        run("other", views=2, cache=disk())


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """24 images of 80 pixels, large enough to be decoded batch by batch."""
    root, draw = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 2)):
        for label in range(3):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                small = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(small).resize((80, 80)).save(folder / f"{i}.jpg")
    return root


@pytest.mark.parametrize("source", ["torchvision", pytest.param("dali", marks=pytest.mark.dali)])
def test_stored_images_are_the_decoded_ones_and_nothing_is_read_twice(
    source, photographs, disk, run, tmp_path, monkeypatch
):
    read, files = FileRecords.read, []
    data = open_dataset(photographs, image_size=72)
    monkeypatch.setattr(FileRecords, "read", lambda self, number: (files.append(number), read(self, number))[1])
    settings = {
        "data": data,
        "source": source,
        "subset": None,
        "validation": 0,
        "batch_size": 8,
        "epochs": 6.0,
        "views": 1,
        "bn_images": 8,
    }
    plain, _ = run("plain", **settings)
    decoded = len(files)
    files.clear()
    cached, _ = run("cached", cache=disk(images=True), **settings)
    assert same(plain, cached)
    # Every image once, and the test split; of the second epoch at most the batches that were begun before these were
    # stored.
    assert decoded > 6 * 24 and 24 + 6 <= len(files) <= 24 + 6 + BATCHES_AHEAD * 8
    files.clear()
    again, _ = run("again", cache=disk(images=True), **settings)
    assert same(plain, again) and len(files) == 6
    assert os.listdir(tmp_path / "cache" / "images.uint8")
    assert open_files(tmp_path / "cache") == []


def open_files(folder) -> list[str]:
    """Files under a folder that this process holds open."""
    links = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
    return [name for name in map(os.readlink, filter(os.path.islink, links)) if name.startswith(str(folder))]


def test_a_run_leaves_no_file_open(run, disk, tmp_path):
    run("a", cache=disk(), epochs=4.0)
    assert open_files(tmp_path / "cache") == []


def test_without_a_directory_no_row_is_stored_already(tmp_path, digits):
    config = DistillConfig(out=str(tmp_path / "x"), device="cpu", cuts=["0", "1", "2"])
    made = Distiller(config, teacher=net(2, 1), student=net(1, 2), dataset=digits)
    output = made.paired.teacher_outputs(torch.randn(4, 3, 8, 8), {0})[0]
    columns = Columns(made.paired, made.source, CacheSettings(), torch.device("cpu"), 1)
    assert columns.stored_rows(0, output, "fp32") == 0
