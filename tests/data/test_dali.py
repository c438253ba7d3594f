"""The DALI source beside the torchvision source: the same views, and the same treatment of whatever lies in a
folder."""

import math
import sys
from pathlib import Path

import pytest
import torch

from stablekd_fast.data import IMAGENET_MEAN, IMAGENET_STD, TrainSource, open_dataset
from stablekd_fast.data.dali import dali_missing, load_dali
from stablekd_fast.data.decoders import pick_source
from stablekd_fast.data.pixels import resize
from stablekd_fast.errors import ConfigError, DataError


def source_of(root, kind: str, *, on_bad_image="skip", size=64, **settings) -> TrainSource:
    dataset = open_dataset(root, image_size=size, on_bad_image=on_bad_image)
    settings = dict(batch_size=8, seed=5, workers=2) | settings
    return TrainSource(dataset.train, dataset.augmentation, IMAGENET_MEAN, IMAGENET_STD, source=kind, **settings)


def psnr(one: torch.Tensor, other: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB between normalised batches `[N, 3, H, W]`."""
    scale = torch.tensor(IMAGENET_STD)[:, None, None] * 255
    error = ((one - other).double() * scale).square().mean().item()
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


@pytest.mark.dali
def test_both_sources_make_the_same_batches_of_whatever_a_folder_holds(strange_tree):
    root, bad = strange_tree
    sources = [source_of(root, kind) for kind in ("torchvision", "dali")]
    seen = set()
    for one, other in zip(*(source.batches(0, 12) for source in sources), strict=True):
        assert torch.equal(one.sample_ids, other.sample_ids) and torch.equal(one.labels, other.labels)
        seen |= set(one.sample_ids.tolist())
        assert psnr(one.images, other.images) >= 35
    assert len(seen) == len(sources[0].split.paths) - len(bad)
    for source in sources:
        assert [path.name for path, _ in source.split.skipped] == bad
    assert sources[0].split.skipped == sources[1].split.skipped


@pytest.mark.dali
@pytest.mark.parametrize("kind", ["torchvision", "dali"])
@pytest.mark.parametrize("name", ["empty.jpg", "text.jpg", "cut.jpg", "head.jpg"])
def test_each_bad_image_stops_either_source_with_its_name(strange_tree, kind, name):
    root, bad = strange_tree
    for other in set(bad) - {name}:
        (root / "train" / "b" / other).unlink()
    with pytest.raises(DataError, match=f"b/{name}"):
        list(source_of(root, kind, on_bad_image="stop").batches(0, 6))


@pytest.mark.dali
def test_a_batch_that_dali_gives_up_on_is_made_all_the_same(strange_tree, monkeypatch):
    """Should DALI refuse what the other decoders take: the batch is done by them, and those in the pipeline are begun
    anew."""
    from stablekd_fast.data import dali

    root, _ = strange_tree
    expected = list(source_of(root, "torchvision").batches(0, 9))
    take, calls = dali._Pipeline.take, []

    def fail_at_times(self, count):
        calls.append(count)
        if len(calls) in (2, 3, 6):
            raise RuntimeError("Error in DALI: a damaged image")
        return take(self, count)

    monkeypatch.setattr(dali._Pipeline, "take", fail_at_times)
    for one, other in zip(source_of(root, "dali").batches(0, 9), expected, strict=True):
        assert torch.equal(one.sample_ids, other.sample_ids) and psnr(one.images, other.images) >= 35
    assert len(calls) == 9


@pytest.mark.dali
def test_dalis_own_failure_on_a_damaged_image_is_survived(strange_tree, monkeypatch):
    """Really damaged bytes in DALI's hands: taken for sound, as an image cut short with an end put behind it would
    be."""
    root, bad = strange_tree
    folder = root / "train" / "b"
    for name in bad:
        (folder / name).unlink()
    sound = (folder / "plain1.jpg").read_bytes()
    frame = sound.index(b"\xff\xda")
    (folder / "plain1.jpg").write_bytes(sound[: frame + 4] + b"\xff\xd9")  # a header, a scan that is none, an end
    sources = [source_of(root, kind) for kind in ("torchvision", "dali")]
    for one, other in zip(*(source.batches(0, 9) for source in sources), strict=True):
        assert torch.equal(one.sample_ids, other.sample_ids) and psnr(one.images, other.images) >= 35
    assert sources[0].split.skipped == sources[1].split.skipped


@pytest.fixture
def scaled_by_the_pipeline(monkeypatch):
    """A pipeline that gives whole batches, as it does on a GPU; here its boxes are scaled as others scale them. Returns
    what it gave."""
    from stablekd_fast.data import dali

    take, given = dali._Pipeline.take, []

    def scaled(self, count):
        given.append(torch.stack([resize(cut, self.size, self.size) for cut in take(self, count)]))
        return given[-1]

    monkeypatch.setattr(dali._Pipeline, "take", scaled)
    return given


def decoded(source, steps=4):
    return list(source.decoder.decode((source.positions(step), 0) for step in range(steps)))


@pytest.mark.dali
@pytest.mark.parametrize("stored", [False, True])
def test_a_batch_that_is_wholly_dalis_is_handed_on_as_it_is(write_large_tree, scaled_by_the_pipeline, stored):
    class Stored(dict):
        def get(self, sample, view):
            return None

        def put(self, sample, view, image):
            self[sample, view] = image.clone()

    source, kept = source_of(write_large_tree(), "dali", batch_size=4), Stored()
    if stored:
        source.store_images(kept)
    found = decoded(source, 2)
    assert [images.data_ptr() for _, images in found] == [given.data_ptr() for given in scaled_by_the_pipeline]
    if stored:
        assert len(kept) == 8
        for positions, images in found:
            for position, image in zip(positions.tolist(), images):
                assert torch.equal(kept[int(source.split.sample_ids[position]), 0], image)


@pytest.mark.dali
def test_a_batch_that_is_dalis_in_part_is_put_together(strange_tree, scaled_by_the_pipeline, monkeypatch):
    found = decoded(source_of(strange_tree[0], "dali"))
    whole = {given.data_ptr() for given in scaled_by_the_pipeline}
    assert not any(images.data_ptr() in whole for _, images in found)
    monkeypatch.undo()
    for (positions, images), (expected, others) in zip(found, decoded(source_of(strange_tree[0], "dali")), strict=True):
        assert positions.tolist() == expected.tolist() and torch.equal(images, others)


@pytest.mark.dali
def test_photographs_scaled_up_and_down_are_within_resampling_of_each_other(tmp_path, picture):
    for part in ("train", "test"):
        (tmp_path / part / "a").mkdir(parents=True)
        for k in range(8):
            picture(k, 300 + 20 * k, 420 - 10 * k).save(tmp_path / part / "a" / f"{k}.jpg", quality=90)
    for size in (65, 96, 224):
        for one, other in zip(
            *(source_of(tmp_path, kind, size=size).batches(0, 4) for kind in ("torchvision", "dali")), strict=True
        ):
            assert psnr(one.images, other.images) >= 35


@pytest.mark.dali
def test_one_pipeline_serves_many_calls(strange_tree):
    root, _ = strange_tree
    source, fresh = source_of(root, "dali"), list(source_of(root, "torchvision").batches(0, 12))
    for start, stop in ((0, 1), (3, 9), (2, 3), (9, 12)):
        for batch, other in zip(source.batches(start, stop), fresh[start:stop], strict=True):
            assert torch.equal(batch.sample_ids, other.sample_ids) and psnr(batch.images, other.images) >= 35
    batches = source.batches(0, 100)
    next(batches)
    batches.close()
    (batch,) = source.batches(5, 6)
    assert torch.equal(batch.sample_ids, fresh[5].sample_ids) and psnr(batch.images, fresh[5].images) >= 35


def test_without_dali_the_automatic_choice_says_why_and_a_demand_fails(strange_tree, monkeypatch):
    root, _ = strange_tree
    monkeypatch.setitem(sys.modules, "nvidia.dali.fn", None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "DALI is not installed" in dali_missing()
    chosen = source_of(root, "auto").choice
    assert chosen.name == "torchvision" and "pip install 'stablekd_fast[dali-cuda13]'" in chosen.reason
    with pytest.raises(ConfigError, match="dali was asked for, but DALI is not installed.*--source torchvision"):
        source_of(root, "dali")


@pytest.mark.parametrize("cuda, extra", [("12.8", "dali-cuda12"), ("13.0", "dali-cuda13"), (None, "dali")])
def test_the_dali_that_is_missing_is_named_for_the_torch_at_hand(monkeypatch, cuda, extra):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setitem(sys.modules, "nvidia.dali.fn", None)
    assert dali_missing().endswith(f"; pip install 'stablekd_fast[{extra}]'")
    assert f"\n{extra} = [" in (Path(__file__).parents[2] / "pyproject.toml").read_text()


@pytest.mark.dali
@pytest.mark.parametrize("cuda", ["12.8", "13.0", None])
def test_a_dali_of_another_cuda_is_used_and_said_to_be_one(strange_tree, monkeypatch, cuda):
    root, _ = strange_tree
    monkeypatch.setattr(torch.version, "cuda", cuda)
    split = open_dataset(root, image_size=64).train
    theirs = load_dali().__cuda_version__ // 1000
    assert theirs in (12, 13)
    on_gpu = pick_source("auto", split, torch.device("cuda"))
    other = cuda is not None and int(cuda[:2]) != theirs
    said = f"DALI is built for CUDA {theirs} and torch for CUDA {(cuda or '')[:2]}; pip install"
    assert on_gpu.name == "dali" and (said in on_gpu.reason) == other
    assert "CUDA" not in pick_source("auto", split, torch.device("cpu")).reason


@pytest.mark.dali
def test_with_dali_the_automatic_choice_is_dali(strange_tree):
    root, _ = strange_tree
    assert source_of(root, "auto").choice.name == "dali"
