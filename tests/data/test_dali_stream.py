"""DALI's own readers as a source: what a pass shows, how its images come out, what it refuses, and how it ends."""

import dataclasses
import json
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from stablekd_fast import distill
from stablekd_fast.cache import CacheSettings
from stablekd_fast.data import IMAGENET_MEAN, IMAGENET_STD, StreamSource, TrainSource, dali_stream, open_dataset
from stablekd_fast.engine.checkpoint import load_tensors
from stablekd_fast.engine.loop import Engine
from stablekd_fast.engine.schedule import Optimizer
from stablekd_fast.errors import ConfigError, DataError

CLASSES, PER_CLASS, SIZE = 3, 7, 32
LEVELS = torch.tensor(IMAGENET_STD)[:, None, None] * 255
"""One normalised unit in levels of 255."""


def ramp(number: int) -> np.ndarray:
    """Grows from left to right; red tells images apart, blue is their number's complement."""
    across = np.linspace(60, 180, 130).astype(np.uint8)
    image = np.empty((90, 130, 3), np.uint8)
    image[...] = np.stack([np.full(130, 10 * number + 20), across, np.full(130, 235 - 10 * number)], axis=1)
    return image


@pytest.fixture
def ramps(tmp_path) -> Path:
    """A tree of JPEGs, 21 to train on, each told by its colour."""
    root = tmp_path / "ramps"
    for part, count in (("train", PER_CLASS), ("test", 2)):
        for label in range(CLASSES):
            (root / part / f"class{label}").mkdir(parents=True)
            for k in range(count):
                picture = Image.fromarray(ramp(label * PER_CLASS + k))
                picture.save(root / part / f"class{label}" / f"{k}.jpg", quality=95, subsampling=0)
    return root


def stream_of(root, *, split=lambda train: train, alter=None, **settings) -> StreamSource:
    dataset = open_dataset(root, image_size=SIZE)
    augmentation = dataclasses.replace(dataset.augmentation, **(alter or {}))
    settings = dict(batch_size=4, seed=5, workers=2) | settings
    return StreamSource(TrainSource(split(dataset.train), augmentation, IMAGENET_MEAN, IMAGENET_STD, **settings))


def ids_of(batches) -> torch.Tensor:
    return torch.cat([batch.sample_ids for batch in batches])


def pixels(batch) -> torch.Tensor:
    """Levels `[N, 3, H, W]` of normalised images."""
    return batch.images * LEVELS + torch.tensor(IMAGENET_MEAN)[:, None, None] * 255


def assert_shows_its_ids(batch):
    """Red and blue are told by the id that the image should have; JPEG may lose a few levels."""
    red, _, blue = pixels(batch).unbind(1)
    assert ((red - 20 - 10 * batch.sample_ids[:, None, None]).abs() <= 4).all()
    assert ((blue - 235 + 10 * batch.sample_ids[:, None, None]).abs() <= 4).all()


@pytest.mark.dali
def test_batches_keep_the_contract_and_their_ids_and_labels_belong_to_the_images(ramps):
    mirrored = 0
    for batch in stream_of(ramps).batches(0, 11):
        assert batch.view is None and batch.sample_ids.dtype == batch.labels.dtype == torch.int64
        assert batch.images.shape == (4, 3, SIZE, SIZE) and batch.images.dtype == torch.float32
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(batch.labels, batch.sample_ids // PER_CLASS)
        assert_shows_its_ids(batch)
        green = pixels(batch)[:, 1]
        rise = green.mean(1)[:, -1] - green.mean(1)[:, 0]
        assert (rise.abs() > 10).all() and (rise.abs() < 125).all()
        mirrored += int((rise < 0).sum())
    assert 10 <= mirrored <= 34  # of 44, a half on average: within 3.6 standard deviations


@pytest.mark.dali
def test_without_flips_nothing_is_mirrored_and_crops_vary(ramps):
    rises = []
    for batch in stream_of(ramps, alter={"flip": False}).batches(0, 5):
        green = pixels(batch)[:, 1].mean(1)
        rises += (green[:, -1] - green[:, 0]).tolist()
    assert min(rises) > 0 and max(rises) - min(rises) > 30


@pytest.mark.dali
def test_crops_are_made_smaller_by_averages(tmp_path):
    """A pattern finer than the pixels of the crop comes out grey. Without a filter it comes out as other stripes."""
    stripes = np.zeros((600, 600, 3), np.uint8)
    stripes[:, 0::4], stripes[:, 1::4] = 255, 255
    for part in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            Image.fromarray(stripes).save(tmp_path / part / name / "0.png")
    [batch] = stream_of(tmp_path, batch_size=2).batches(0, 1)
    # Crops of a few source pixels for each of their own keep some contrast.
    assert (pixels(batch) - 127.5).abs().mean() < 25


@pytest.mark.dali
def test_jitter_changes_brightness_within_its_strength(ramps):
    """On images of one grey, of which saturation changes nothing."""
    root = ramps.parent / "grey"
    for part in ("train", "test"):
        (root / part / "a").mkdir(parents=True)
        for k in range(8):
            Image.new("RGB", (100, 80), (128,) * 3).save(root / part / "a" / f"{k}.jpg", quality=95)
    shown = torch.cat(
        [pixels(batch).mean((1, 2, 3)) for batch in stream_of(root, alter={"jitter": 0.4}).batches(0, 10)]
    )
    # Brightness moves grey by up to 40% of 128, and contrast stretches that distance from the middle by up to 1.4.
    assert ((shown - 128).abs() <= 128 * 0.4 * 1.4 + 2).all() and shown.std() > 10
    plain = torch.cat([pixels(batch) for batch in stream_of(root).batches(0, 10)])
    assert ((plain - 128).abs() <= 2).all()


@pytest.mark.dali
@pytest.mark.parametrize("jitter", [0.0, 0.4])
def test_crops_are_dalis_own_memory_and_batches_are_not(ramps, monkeypatch, jitter):
    """What DALI made is normalised where it lies; what it makes there later changes no batch."""
    taken, lying = [], []
    take = dali_stream.ReaderPipeline.take

    def seen(self):
        run = self._dali.run
        self._dali.run = lambda: (lambda out: (lying.append(out[0].as_tensor().data_ptr()), out)[1])(run())
        places, images, coins = take(self)
        self._dali.run = run
        taken.append(images.data_ptr())
        return places, images, coins

    monkeypatch.setattr(dali_stream.ReaderPipeline, "take", seen)
    batches, copies = [], []
    for batch in stream_of(ramps, alter={"jitter": jitter}).batches(0, 64):
        batches.append(batch.images)
        copies.append(batch.images.clone())
    assert taken == lying and len(set(taken)) < 64, "the memory is used again"
    assert all(map(torch.equal, batches, copies))


def test_every_pass_shows_every_image_once_and_no_batch_is_short(ramps):
    """21 images in batches of 4: the sixth batch holds the last of one pass and the first of the next."""
    ids = ids_of(stream_of(ramps).batches(0, 21)).view(4, 21)
    assert all(torch.equal(row.sort().values, torch.arange(21)) for row in ids)
    assert len({tuple(row.tolist()) for row in ids}) == 4


@pytest.mark.dali
def test_subsets_and_held_out_images_are_respected(ramps):
    kept = open_dataset(ramps, image_size=SIZE).train.holdout(6, 0)[0].subset(9, 1).sample_ids
    stream = stream_of(ramps, split=lambda train: train.holdout(6, 0)[0].subset(9, 1), batch_size=3)
    batches = list(stream.batches(0, 6))
    assert torch.equal(ids_of(batches).view(2, 9).sort().values, kept.expand(2, 9))
    for batch in batches:
        assert_shows_its_ids(batch)
        assert torch.equal(batch.labels, batch.sample_ids // PER_CLASS)


@pytest.mark.dali
def test_ranks_divide_a_pass_and_change_shards(ramps):
    """Shards of 10 and 11 of 21 images; behind its own a rank reads the other's."""
    ranks = [ids_of(stream_of(ramps, batch_size=2, rank=rank, ranks=2).batches(0, 21)) for rank in range(2)]
    shards = [ranks[0][:10], ranks[1][:11]]
    assert torch.equal(torch.cat(shards).sort().values, torch.arange(21))
    for rank, ids in enumerate(ranks):
        other = shards[1 - rank]
        assert set(ids[len(shards[rank]) :][: len(other)].tolist()) == set(other.tolist())


@pytest.mark.dali
def test_seed_and_start_decide_the_order_whatever_the_threads(ramps):
    def shown(start=0, **settings):
        return list(stream_of(ramps, **settings).batches(start, start + 6))

    first = shown()
    for one, other in zip(first, shown(workers=1, prefetch=4), strict=True):
        assert torch.equal(one.sample_ids, other.sample_ids) and torch.equal(one.images, other.images)
    for others in (shown(seed=6), shown(start=1)):
        assert not torch.equal(ids_of(first), ids_of(others))


@pytest.mark.dali
def test_bf16_images_are_those_in_float32_rounded_once(ramps):
    for one, other in zip(stream_of(ramps).batches(0, 3, torch.bfloat16), stream_of(ramps).batches(0, 3), strict=True):
        assert one.images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(one.images, other.images.bfloat16())


@pytest.mark.dali
@pytest.mark.parametrize("content, said", [(b"", "0.jpg"), (b"no picture", "failure"), (None, "0.jpg")])
def test_a_bad_image_ends_the_stream_with_what_to_do(ramps, content, said):
    bad = ramps / "train" / "class1" / "0.jpg"
    stream = stream_of(ramps)
    bad.unlink() if content is None else bad.write_bytes(content)
    with pytest.raises(DataError, match=f"{said}.*cannot say at which image.*--source dali .*--on-bad-image skip"):
        list(stream.batches(0, 6))


def threads_of_the_process() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.mark.dali
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts the threads of a process as Linux lists them")
def test_leaving_early_stops_dalis_threads(ramps):
    list(stream_of(ramps).batches(0, 2))  # what DALI starts once for a process
    before = threads_of_the_process()
    with closing(stream_of(ramps, workers=3).batches(0, 1000)) as batches:
        next(batches)
        assert threads_of_the_process() > before
    assert threads_of_the_process() == before


# Whole runs.


def net(width: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    blocks = [
        nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU()) for a, b in ((3, width), (width, width))
    ]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES))


def run(root: Path, out: Path, **settings):
    settings = dict(
        data=str(root), image_size=SIZE, source="dali-stream", epochs=4.0, validation=3, batch_size=4, bn_images=8,
        cuts=["0", "1"],
        optimizer=Optimizer(lr=0.01), device="cpu", precision="fp32", log_every=1, out=str(out), progress=False,
    ) | settings  # fmt: skip
    return distill(teacher=net(8, 1).eval(), student=net(8, 2), **settings)


def events_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "events.jsonl").open()]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.dali
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_trains_through_its_stages_and_another_gives_the_same_bits(ramps, tmp_path, precision):
    outs = [tmp_path / name for name in ("one", "two")]
    for out in outs:
        result = run(ramps, out, precision=precision)
        assert result.steps == 16 and 0 <= result.accuracy <= 1
    one, two = (load_tensors(out / "student.safetensors")[0] for out in outs)
    assert all(torch.equal(one[name], two[name]) for name in one)
    events = events_of(outs[0])
    assert events[0]["source"]["name"] == "dali-stream"
    assert {"merge", "evaluate", "stage_end"} <= {event["kind"] for event in events}
    losses = [event["losses"] for event in events if event["kind"] == "train"]
    assert len(losses) == 16 and all(np.isfinite(list(row.values())).all() for row in losses)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.dali
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts the threads of a process as Linux lists them")
def test_a_run_that_fails_midway_leaves_no_threads_and_is_resumed_with_a_new_pass(ramps, tmp_path, monkeypatch):
    whole, broken, step = tmp_path / "whole", tmp_path / "broken", Engine._train_step
    run(ramps, whole, checkpoint_every=1)
    before = threads_of_the_process()

    def fails(self, stage, batch):
        if self.progress.step == 5:
            raise RuntimeError("in the midst of it")
        step(self, stage, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_train_step", fails)
        with pytest.raises(RuntimeError, match="in the midst of it"):
            run(ramps, broken, checkpoint_every=1)
    assert threads_of_the_process() == before
    assert run(ramps, broken, checkpoint_every=1, resume=True).steps == 16
    losses = [{e["step"]: e["losses"] for e in events_of(out) if e["kind"] == "train"} for out in (whole, broken)]
    assert losses[0].keys() == losses[1].keys()
    assert all(losses[0][k] == losses[1][k] for k in range(1, 6)) and losses[0][7] != losses[1][7]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.dali
def test_rows_are_not_kept_and_a_run_says_so(ramps, tmp_path):
    with pytest.warns(RuntimeWarning, match="keeps nothing: the views of source=dali-stream have no names"):
        run(ramps, tmp_path / "run", cache=CacheSettings(directory=str(tmp_path / "rows")), epochs=1.0)
    assert not (tmp_path / "rows").exists()


@pytest.mark.dali
def test_what_needs_order_or_names_is_refused_in_one_sentence(ramps, tmp_path):
    keeping = CacheSettings(plan="all", directory=str(tmp_path / "rows"), images=True)
    refused = "dali-stream was given together with views, mix, cache.plan=all, cache.images: that needs"
    with pytest.raises(ConfigError, match=refused):
        run(ramps, tmp_path / "run", views=2, mix="mixup", cache=keeping)
    for name, value in {"scaled_decode": True, "on_bad_image": "skip"}.items():
        with pytest.raises(ConfigError, match=f"together with {name}.*use source=dali"):
            run(ramps, tmp_path / "run", **{name: value})
    with pytest.raises(ConfigError, match="Named views are needed here.*use auto, dali or torchvision"):
        stream_of(ramps, source="dali-stream")
    assert not (tmp_path / "run").exists() and not (tmp_path / "rows").exists()


def test_small_images_and_a_missing_dali_are_refused(ramps, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="decodes large images, but these are small"):
        distill(data="digits", teacher=net(8, 1), student=net(8, 2), source="dali-stream", out=str(tmp_path / "run"))
    monkeypatch.setitem(sys.modules, "nvidia.dali.fn", None)
    with pytest.raises(ConfigError, match="dali-stream was asked for, but DALI is not installed.*--source torchvision"):
        stream_of(ramps)


LEAVE_EARLY = """
import sys
from stablekd_fast.data import StreamSource, TrainSource, open_dataset
data = open_dataset(sys.argv[1], image_size=32)
source = TrainSource(data.train, data.augmentation, data.mean, data.std, batch_size=4, seed=0, workers=2)
batches = StreamSource(source).batches(0, 100)
next(batches)
print("leaving", flush=True)
{}
"""


@pytest.mark.dali
@pytest.mark.parametrize("ending, codes", [("", (0,)), ("raise KeyboardInterrupt", (130, -2))])
def test_a_process_ends_with_batches_in_work(ramps, ending, codes):
    command = [sys.executable, "-c", LEAVE_EARLY.format(ending), str(ramps)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.stdout == "leaving\n"
    assert done.returncode in codes
