"""Sources on a GPU: the same views as on the CPU, made on the device."""

import numpy as np
import pytest
import torch
from PIL import Image

from stablekd_fast.data import StreamSource, TrainSource, open_dataset

pytestmark = pytest.mark.gpu


@pytest.fixture
def photographs(tmp_path):
    for part, count in (("train", 12), ("test", 2)):
        (tmp_path / part / "a").mkdir(parents=True)
        for k in range(count):
            small = np.random.default_rng(k).integers(0, 256, (6, 8, 3), dtype=np.uint8)
            Image.fromarray(small).resize((300 - 5 * k, 240 + 9 * k), Image.Resampling.BICUBIC).save(
                tmp_path / part / "a" / f"{k}.jpg"
            )
    return tmp_path


def source_of(dataset, device, name="auto"):
    return TrainSource(
        dataset.train,
        dataset.augmentation,
        dataset.mean,
        dataset.std,
        batch_size=4,
        seed=3,
        workers=2,
        device=device,
        source=name,
    )


def batches(dataset, device, name="auto"):
    return list(source_of(dataset, device, name).batches(0, 6))


def assert_same_views(ours, expected, tolerance):
    for one, other in zip(ours, expected, strict=True):
        assert (
            one.images.is_cuda
            and torch.equal(one.sample_ids, other.sample_ids)
            and torch.equal(one.labels, other.labels)
        )
        assert ((one.images.cpu() - other.images).square().mean().sqrt() <= tolerance).all()


def test_resident_images_are_cropped_on_the_device():
    digits = open_dataset("digits")
    assert_same_views(batches(digits, "cuda"), batches(digits, "cpu"), 1e-6)


def test_decoded_images_are_normalised_on_the_device(photographs):
    dataset = open_dataset(photographs)
    assert_same_views(batches(dataset, "cuda", "torchvision"), batches(dataset, "cpu", "torchvision"), 1e-6)


@pytest.mark.dali
def test_dali_decodes_on_the_device(photographs):
    """35 dB: 0.018 of full scale, 0.08 in units of the standard deviation."""
    dataset = open_dataset(photographs)
    assert_same_views(batches(dataset, "cuda", "dali"), batches(dataset, "cpu", "torchvision"), 0.08)


@pytest.mark.dali
def test_dalis_own_readers_stream_to_the_device(photographs):
    dataset = open_dataset(photographs)
    streamed = list(StreamSource(source_of(dataset, "cuda")).batches(0, 6, torch.bfloat16))
    for batch in streamed:
        assert batch.images.is_cuda and batch.images.shape == (4, 3, 224, 224) and batch.images.dtype == torch.bfloat16
        assert batch.images.is_contiguous(memory_format=torch.channels_last) and batch.images.std() > 0.1
    ids = torch.cat([batch.sample_ids for batch in streamed]).view(2, 12)
    assert torch.equal(ids.sort().values, torch.arange(12).expand(2, 12))


@pytest.mark.parametrize("name", ["torchvision", pytest.param("dali", marks=pytest.mark.dali)])
def test_bf16_images_are_those_in_float32_rounded_once(photographs, name):
    dataset = open_dataset(photographs)
    source = source_of(dataset, "cuda", name)
    for one, other in zip(source.batches(0, 3, torch.bfloat16), source.batches(0, 3), strict=True):
        assert torch.equal(one.images, other.images.bfloat16())


@pytest.mark.parametrize("name", ["torchvision", pytest.param("dali", marks=pytest.mark.dali)])
def test_an_evaluation_in_mid_run_leaves_training_with_its_images(photographs, name):
    dataset = open_dataset(photographs)
    alone = batches(dataset, "cuda", name)
    source = source_of(dataset, "cuda", name)
    for batch, expected in zip(source.batches(0, 6), alone, strict=True):
        assert torch.equal(batch.images, expected.images) and torch.equal(batch.sample_ids, expected.sample_ids)
        for looked_at, other in zip(source.batches(1, 3), alone[1:]):
            assert torch.equal(looked_at.images, other.images)
