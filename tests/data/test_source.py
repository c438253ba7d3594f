import dataclasses
import subprocess
import sys
import threading
import time
from contextlib import closing

import numpy as np
import pytest
import torch
from PIL import Image

from stablekd_fast.data import Augmentation, TrainSource, open_dataset, views
from stablekd_fast.data.records import FileRecords
from stablekd_fast.errors import ConfigError, DataError
from tests.data.reference import MEAN, STD, assert_within_a_level, normalised, scaled, small_split
from tests.processes import output_of

PAD_CROP = Augmentation("pad_crop", flip=True, padding=2)


def small_source(split=None, **settings) -> TrainSource:
    return TrainSource(split or small_split(), PAD_CROP, MEAN, STD, **(dict(batch_size=4, seed=7) | settings))


@pytest.fixture(params=["torchvision", pytest.param("dali", marks=pytest.mark.dali)])
def large_source(write_large_tree, request):
    def make(on_bad_image="stop", root=None, **settings) -> TrainSource:
        dataset = open_dataset(root or write_large_tree(), image_size=32, on_bad_image=on_bad_image)
        settings = dict(batch_size=4, seed=7, source=request.param) | settings
        return TrainSource(dataset.train, dataset.augmentation, MEAN, STD, **settings)

    return make


def assert_same(first, second):
    first, second = list(first), list(second)
    assert len(first) == len(second)
    for one, other in zip(first, second):
        assert one.view == other.view
        for field in ("sample_ids", "images", "labels"):
            assert torch.equal(getattr(one, field), getattr(other, field))


def test_batch_contract():
    split = small_split().subset(13, seed=0)
    (batch,) = small_source(split).batches(0, 1)
    assert batch.sample_ids.dtype == batch.labels.dtype == torch.int64
    assert batch.images.dtype == torch.float32 and batch.images.shape == (4, 3, 6, 5)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert set(batch.sample_ids.tolist()) <= set(split.sample_ids.tolist())
    assert torch.equal(batch.labels, batch.sample_ids % 3)


def test_images_are_the_named_views():
    split = small_split()
    for batch in small_source(split).batches(4, 7):
        offsets, flips = views.crop_offsets_and_flips(7, batch.sample_ids.numpy(), batch.view, 2)
        for image, sample, (top, left), flip in zip(batch.images, batch.sample_ids, offsets, flips):
            padded = np.pad(split.images[sample].numpy(), ((2, 2), (2, 2), (0, 0)))
            crop = padded[top : top + 6, left : left + 5]
            torch.testing.assert_close(image.double(), normalised(crop[:, ::-1] if flip else crop), atol=1e-5, rtol=0)


def test_an_epoch_shows_every_image_once_and_drops_the_rest():
    source = small_source()
    assert source.steps_per_epoch == 5
    epochs = [torch.cat([batch.sample_ids for batch in source.batches(5 * epoch, 5 * epoch + 5)]) for epoch in range(2)]
    assert all(len(ids) == len(ids.unique()) == 20 for ids in epochs)
    assert not torch.equal(*epochs)


def test_epochs_cycle_through_the_views():
    assert [batch.view for batch in small_source(views=2).batches(0, 20)] == [0] * 5 + [1] * 5 + [0] * 5 + [1] * 5
    assert [batch.view for batch in small_source().batches(0, 15)] == [0] * 5 + [1] * 5 + [2] * 5
    first, _, third = (
        {
            sample: image
            for batch in small_source(views=2).batches(5 * epoch, 5 * epoch + 5)
            for sample, image in zip(batch.sample_ids.tolist(), batch.images)
        }
        for epoch in range(3)
    )
    in_both = first.keys() & third.keys()
    assert len(in_both) >= 18 and all(torch.equal(first[sample], third[sample]) for sample in in_both)


def test_resume_gives_the_same_batches():
    assert_same(small_source().batches(5, 8), list(small_source().batches(0, 8))[5:])
    source = small_source()
    interleaved = [batch for pair in zip(source.batches(3, 8), source.batches(8, 13)) for batch in pair]
    assert_same(interleaved[::2], small_source().batches(3, 8))


def assert_rounded_once(source):
    for one, other in zip(source.batches(1, 3, torch.bfloat16), source.batches(1, 3), strict=True):
        assert one.images.dtype == torch.bfloat16 and one.images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(one.images, other.images.bfloat16())
        assert torch.equal(one.sample_ids, other.sample_ids) and torch.equal(one.labels, other.labels)


@pytest.mark.parametrize("alter", [{}, {"jitter": 0.4}, {"mix": "mixup"}])
def test_bf16_images_are_those_in_float32_rounded_once(alter):
    augmentation = dataclasses.replace(PAD_CROP, **alter)
    assert_rounded_once(TrainSource(small_split(), augmentation, MEAN, STD, batch_size=4, seed=7, classes=3))


def test_large_bf16_images_are_those_in_float32_rounded_once(large_source):
    assert_rounded_once(large_source())


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_divide_the_batches_of_one_process(ranks):
    parts = [list(small_source(batch_size=8, rank=rank, ranks=ranks).batches(1, 5)) for rank in range(ranks)]
    for whole, *own in zip(small_source(batch_size=8).batches(1, 5), *parts, strict=True):
        assert all(len(part.labels) == 8 // ranks and part.view == whole.view for part in own)
        for field in ("sample_ids", "images", "labels"):
            assert torch.equal(torch.cat([getattr(part, field) for part in own]), getattr(whole, field))


def test_ranks_of_large_images(large_source, write_large_tree):
    root = write_large_tree()
    parts = [large_source(root=root, rank=rank, ranks=2, workers=rank).batches(2, 5) for rank in range(2)]
    for whole, *own in zip(large_source(root=root).batches(2, 5), *parts, strict=True):
        assert torch.equal(torch.cat([part.sample_ids for part in own]), whole.sample_ids)
        assert torch.equal(torch.cat([part.images for part in own]), whole.images)


def every_other(ids: torch.Tensor, view: int) -> bool:
    return int(ids.sum()) % 2 == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_nobody_needs_are_left_out(large_source, workers):
    for source, stop in ((small_source(), 12), (large_source(workers=workers), 7)):
        batches = list(source.batches(1, stop, needed=every_other))
        assert 0 < sum(batch.images is None for batch in batches) < len(batches)
        for whole, batch in zip(source.batches(1, stop), batches, strict=True):
            assert (batch.images is not None) == every_other(whole.sample_ids, whole.view)
            images = whole.images if batch.images is None else batch.images
            assert_same([whole], [dataclasses.replace(batch, images=images)])


@pytest.mark.parametrize("workers", [0, 2])
def test_no_more_is_asked_ahead_where_little_is_needed(large_source, workers):
    """Whether images are needed may change from batch to batch, and a long stage is not looked through at once."""
    asked = []

    def first_only(ids: torch.Tensor, view: int) -> bool:
        asked.append(view)
        return len(asked) == 1

    with closing(large_source(workers=workers).batches(0, 1000, needed=first_only)) as batches:
        for number, batch in zip(range(1, 8), batches):
            assert (batch.images is not None) == (number == 1)
            assert number <= len(asked) <= number + 10
            assert batch.labels.shape == (4,)


def test_images_are_made_where_others_stand_in_for_bad_ones(large_source, write_large_tree):
    """All ranks must agree on which image a label belongs to."""
    root = write_large_tree()
    (root / "train" / "bee" / "2.JPEG").write_bytes(b"")
    sources = [large_source(root=root, batch_size=5, on_bad_image="skip") for _ in range(2)]
    for whole, batch in zip(sources[0].batches(0, 3), sources[1].batches(0, 3, needed=lambda *_: False), strict=True):
        assert_same([whole], [batch])


def test_files_that_nobody_needs_are_not_read(large_source, write_large_tree):
    root = write_large_tree()
    source = large_source(root=root)
    for file in (root / "train").rglob("*.JPEG"):
        file.write_bytes(b"")
    assert len(list(source.batches(0, 3, needed=lambda *_: False))) == 3
    with pytest.raises(DataError):
        next(source.batches(0, 3))


def test_the_seed_changes_order_and_views():
    (first,), (second,) = small_source(seed=0).batches(0, 1), small_source(seed=1).batches(0, 1)
    assert not torch.equal(first.sample_ids, second.sample_ids)


PRINT_A_HASH = """
import hashlib
from stablekd_fast.data import TrainSource, open_dataset
digits = open_dataset("digits")
rest, held_out = digits.train.holdout(100, seed=3)
hashed = hashlib.sha256(held_out.sample_ids.numpy().tobytes())
split = rest.subset(400, seed=8)
source = TrainSource(split, digits.augmentation, digits.mean, digits.std, batch_size=32, seed=1)
for batch in source.batches(50, 53):
    hashed.update(batch.sample_ids.numpy().tobytes() + batch.images.numpy().tobytes())
print(hashed.hexdigest())
"""


def test_another_process_takes_the_same_subsets_and_batches(capsys):
    there = output_of("-c", PRINT_A_HASH)
    exec(PRINT_A_HASH, {})
    assert len(there) == 65 and capsys.readouterr().out == there


def test_resume_of_large_images(large_source, write_large_tree):
    root = write_large_tree()
    assert_same(large_source(root=root).batches(5, 8), list(large_source(root=root).batches(0, 8))[5:])


def test_threads_change_nothing(large_source, write_large_tree):
    root = write_large_tree()
    assert_same(large_source(root=root, workers=3).batches(0, 7), large_source(root=root).batches(0, 7))


@pytest.mark.parametrize("prefetch", [1, 5])
def test_how_far_ahead_is_decoded_changes_nothing(large_source, write_large_tree, prefetch):
    root = write_large_tree()
    ahead = large_source(root=root, workers=2, prefetch=prefetch)
    assert_same(ahead.batches(0, 7), large_source(root=root).batches(0, 7))


def test_prefetch_is_the_number_of_batches_in_work(large_source, write_large_tree, monkeypatch):
    root, read, files = write_large_tree(), FileRecords.read, []
    monkeypatch.setattr(FileRecords, "read", lambda self, number: (files.append(number), read(self, number))[1])
    for prefetch in (1, 4):
        source = large_source(root=root, workers=2, prefetch=prefetch)
        files.clear()
        with closing(source.batches(0, 100)) as batches:
            next(batches)
            deadline = time.monotonic() + 30
            while len(files) < (1 + prefetch) * source.batch_size and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.1)
            begun = len(files) / source.batch_size
        assert 1 + prefetch <= begun <= 1 + 2 * prefetch + 1  # DALI's reading and its pipeline hold as many each


def test_large_images_are_the_named_views(large_source):
    source = large_source()
    for batch in source.batches(2, 5):
        assert batch.images.shape == (4, 3, 32, 32) and batch.images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(batch.labels, batch.sample_ids // 5)
        for image, sample in zip(batch.images, batch.sample_ids.numpy()):
            picture = Image.open(source.split.paths[sample])
            size = np.array([picture.height]), np.array([picture.width])
            ((top, left, height, width),) = views.resized_crop_boxes(7, np.array([sample]), batch.view, *size).tolist()
            pixels = scaled(np.asarray(picture)[top : top + height, left : left + width], 32, 32)
            (flip,) = views.view_flips(7, np.array([sample]), batch.view)
            assert_within_a_level(image, pixels[:, ::-1] if flip else pixels)


def test_scaled_decoding_is_another_view_of_the_same_pictures(write_large_tree):
    dataset = open_dataset(write_large_tree(), image_size=24)
    scaled = dataclasses.replace(dataset.augmentation, scaled_decode=True)
    one, other = (
        next(TrainSource(dataset.train, augmentation, MEAN, STD, batch_size=15, seed=7).batches(0, 1))
        for augmentation in (dataset.augmentation, scaled)
    )
    assert torch.equal(one.sample_ids, other.sample_ids) and one.images.shape == other.images.shape
    same = [torch.equal(image, twin) for image, twin in zip(one.images, other.images)]
    assert 0 < sum(same) < 15  # boxes of at least 48 pixels are decoded at a half
    with pytest.raises(ConfigError, match="source=dali cannot do"):
        TrainSource(dataset.train, scaled, MEAN, STD, batch_size=4, seed=7, source="dali")


class Stored:
    """Decoded views in a dictionary."""

    def __init__(self):
        self.views, self.called = {}, []

    def get(self, sample, view):
        return self.views.get((sample, view))

    def put(self, sample, view, image):
        assert (sample, view) not in self.views
        self.views[sample, view] = image.clone()

    def refresh(self):
        self.called.append("refresh")

    def close(self):
        self.called.append("close")


def test_stored_views_are_decoded_once_for_all_parts_of_a_source(large_source, write_large_tree):
    root, stored = write_large_tree(), Stored()
    expected = list(large_source(root=root, views=2).batches(0, 6))
    source = large_source(root=root, views=2)
    source.store_images(stored)
    parts = [source.part(rank, 2) for rank in range(2)]
    for whole, *own in zip(expected, *(part.batches(0, 6) for part in parts), strict=True):
        assert torch.equal(torch.cat([part.images for part in own]), whole.images)
    for file in (root / "train").rglob("*.JPEG"):
        file.write_bytes(b"")
    assert_same(source.batches(0, 6), expected)
    parts[1].refresh_stored()
    source.close()
    assert stored.called == ["refresh", "close"]


def test_where_nothing_is_stored_there_is_nothing_to_take_up_or_to_close(large_source):
    for source in (small_source(), large_source()):
        source.refresh_stored()
        source.close()
        assert len(next(source.batches(0, 1)).labels) == source.batch_size  # and it goes on as before


def test_leaving_early_stops_the_threads(large_source):
    before = threading.active_count()
    batches = large_source(workers=2).batches(0, 1000)
    next(batches)
    batches.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_large_image_stops_with_its_name(large_source, write_large_tree, workers):
    root = write_large_tree()
    bad = root / "train" / "bee" / "2.JPEG"
    bad.write_bytes(bad.read_bytes()[:800])
    with pytest.raises(DataError, match="bee/2.JPEG.*truncated"):
        list(large_source(root=root, workers=workers).batches(0, 3))


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_large_image_is_replaced_and_counted(large_source, write_large_tree, workers):
    root = write_large_tree()
    sound = list(large_source(root=root, batch_size=5).batches(0, 3))
    bad = root / "train" / "bee" / "2.JPEG"
    bad.write_bytes(b"")
    source = large_source(root=root, batch_size=5, on_bad_image="skip", workers=workers)
    batches = list(source.batches(0, 3))
    assert source.split.skipped == [(bad, "the file is empty")]
    ids, sound_ids = (torch.cat([batch.sample_ids for batch in part]) for part in (batches, sound))
    # Sample 7 is the bad one; the next, 8, stands in for it and everything else stays.
    assert torch.equal(ids, torch.where(sound_ids == 7, 8, sound_ids))
    assert all(torch.equal(batch.labels, batch.sample_ids // 5) for batch in batches)
    assert_same(source.batches(1, 3), batches[1:])


def test_all_large_images_bad(large_source, write_large_tree):
    root = write_large_tree()
    source = large_source(root=root, on_bad_image="skip")
    for path in source.split.paths:
        path.write_bytes(b"")
    with pytest.raises(DataError, match="None of 15 training images"):
        next(source.batches(0, 1))


def test_too_large_a_batch_says_what_to_do():
    with pytest.raises(DataError, match="batch of 23 does not fit 22 .*at most 22"):
        small_source(batch_size=23)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(batch_size=0), "batch size"),
        (dict(views=0), "views"),
        (dict(workers=-1), "workers"),
        (dict(prefetch=0), "prefetch=0"),
        (dict(ranks=3), "multiple of 3"),
        (dict(rank=2, ranks=2), "Rank 2 of 2"),
        (dict(source="dalli"), "nearest is 'dali'"),
        (dict(source="torchvision"), "small and kept in memory"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        small_source(**settings)


def test_augmentation_must_fit(write_large_tree):
    large = open_dataset(write_large_tree()).train
    with pytest.raises(ConfigError, match="Large images .*'resized_crop', got 'pad_crop'"):
        TrainSource(large, PAD_CROP, MEAN, STD, batch_size=2, seed=0)
    with pytest.raises(ConfigError, match="Small images .*'pad_crop', got 'resized_crop'"):
        TrainSource(small_split(), Augmentation("resized_crop", flip=True, size=8), MEAN, STD, batch_size=2, seed=0)


LEAVE_EARLY = """
import sys
from stablekd_fast.data import TrainSource, open_dataset
dataset = open_dataset(sys.argv[1], image_size=32)
source = TrainSource(
    dataset.train, dataset.augmentation, dataset.mean, dataset.std, batch_size=4, seed=0, workers=2, source=sys.argv[2]
)
batches = source.batches(0, 100)
next(batches)
print("leaving", flush=True)
{}
"""


@pytest.mark.parametrize("kind", ["torchvision", pytest.param("dali", marks=pytest.mark.dali)])
@pytest.mark.parametrize("ending, codes", [("", (0,)), ("sys.exit(3)", (3,)), ("raise KeyboardInterrupt", (130, -2))])
def test_a_process_ends_with_batches_in_work(write_large_tree, kind, ending, codes):
    command = [sys.executable, "-c", LEAVE_EARLY.format(ending), str(write_large_tree()), kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.stdout == "leaving\n"
    assert done.returncode in codes
