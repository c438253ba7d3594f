"""Colour jitter and mixed images are part of a view: drawn from its key, the same in every source, labels mixed
alike."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from stablekd_fast.data import Augmentation, Split, TrainSource, open_dataset, views
from stablekd_fast.data.augment import draw_mix_weights, draw_partners
from stablekd_fast.errors import ConfigError

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
SEED = 7
SOURCES = ["torchvision", pytest.param("dali", marks=pytest.mark.dali)]


def resident_source(**altering) -> TrainSource:
    images = np.random.default_rng(0).integers(0, 256, (22, 6, 5, 3), dtype=np.uint8)
    split = Split(torch.arange(22) % 3, images=torch.from_numpy(images))
    augmentation = Augmentation("pad_crop", flip=True, padding=2, **altering)
    return TrainSource(split, augmentation, MEAN, STD, batch_size=4, seed=SEED, classes=3)


def large_source(root, kind="torchvision", on_bad_image="stop", **altering) -> TrainSource:
    dataset = open_dataset(root, image_size=32, on_bad_image=on_bad_image)
    augmentation = dataclasses.replace(dataset.augmentation, **altering)
    return TrainSource(
        dataset.train, augmentation, MEAN, STD, batch_size=5, seed=SEED, classes=3, source=kind, workers=2
    )


def as_pixels(images: torch.Tensor) -> torch.Tensor:
    """Normalised `[N, 3, H, W]` to values of 0 to 255."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (images.double() * std + mean) * 255


def plain_views(source: TrainSource, view: int) -> dict[int, torch.Tensor]:
    """Pixels of every image in one view, unaltered, by sample."""
    return {
        sample: image
        for batch in source.whole_view(view)
        for sample, image in zip(batch.sample_ids.tolist(), as_pixels(batch.images).round())
    }


def sources(kind, write_large_tree):
    if kind == "resident":
        return resident_source
    root = write_large_tree()
    return lambda **altering: large_source(root, **altering)


@pytest.mark.parametrize("kind", ["resident", "large"])
@pytest.mark.parametrize("alpha", [1.0, 0.4])
def test_mixup_is_the_rounded_mean_of_two_views(kind, alpha, write_large_tree):
    make = sources(kind, write_large_tree)
    mixed, plain = make(mix="mixup", mix_alpha=alpha), make()
    for batch in mixed.batches(3, 6):
        unaltered, ids = plain_views(plain, batch.view), batch.sample_ids.numpy()
        partners = mixed.split.sample_ids[torch.from_numpy(draw_partners(SEED, ids, batch.view, len(mixed.split)))]
        weights = draw_mix_weights(SEED, ids, batch.view, alpha)
        for image, label, sample, partner, weight in zip(
            as_pixels(batch.images), batch.labels, ids.tolist(), partners.tolist(), weights
        ):
            expected = weight * unaltered[sample] + (1 - weight) * unaltered[partner]
            assert (image - expected).abs().max() <= 0.501
            own, other = (F.one_hot(mixed.split.labels[s], 3) for s in (sample, partner))
            torch.testing.assert_close(label, (weight * own + (1 - weight) * other).float())


def test_mixed_images_are_always_made_as_labels_depend_on_them():
    batches = resident_source(mix="cutmix").batches(0, 3, needed=lambda *_: False)
    assert all(batch.images is not None for batch in batches)


@pytest.mark.parametrize("kind", ["resident", "large"])
def test_cutmix_pastes_a_box_and_labels_by_its_area(kind, write_large_tree):
    make = sources(kind, write_large_tree)
    mixed, plain = make(mix="cutmix"), make()
    pasted = 0
    for batch in mixed.batches(0, 8):
        unaltered = plain_views(plain, batch.view)
        partners = mixed.split.sample_ids[
            torch.from_numpy(draw_partners(SEED, batch.sample_ids.numpy(), batch.view, len(mixed.split)))
        ]
        for image, label, sample, partner in zip(
            as_pixels(batch.images).round(), batch.labels, batch.sample_ids.tolist(), partners.tolist()
        ):
            if partner == sample:
                continue
            foreign = (image != unaltered[sample]).any(0)
            assert torch.equal(image[:, foreign], unaltered[partner][:, foreign])
            rows, columns = foreign.any(1).nonzero().flatten(), foreign.any(0).nonzero().flatten()
            area = len(range(rows[0], rows[-1] + 1)) * len(range(columns[0], columns[-1] + 1)) if len(rows) else 0
            pasted += area > 0
            # Large images are noise, so that every pixel of the box differs.
            if kind == "large" and mixed.split.labels[sample] != mixed.split.labels[partner]:
                assert abs(float(label[mixed.split.labels[partner]]) - area / foreign.numel()) < 1e-6
            assert abs(float(label.sum()) - 1) < 1e-6
    assert pasted > 8


def test_mix_weights_follow_the_beta_distribution():
    ids = np.arange(20_000)
    for alpha in (0.2, 1.0, 2.0, 3.0):
        weights = draw_mix_weights(0, ids, 1, alpha)
        assert abs(weights.mean() - 0.5) < 0.01 and abs(weights.var() - 0.25 / (2 * alpha + 1)) < 0.003
    partners = draw_partners(0, ids, 1, 10)
    assert (np.bincount(partners) > 1800).all()


@pytest.mark.parametrize("kind", ["resident", "large"])
def test_jitter_is_within_a_level_of_its_definition(kind, write_large_tree):
    make = sources(kind, write_large_tree)
    altered, plain = make(jitter=0.5), make()
    gray = np.array([0.299, 0.587, 0.114])
    differing = 0
    for batch in altered.batches(2, 5):
        unaltered, ids = plain_views(plain, batch.view), batch.sample_ids.numpy()
        drawn = [
            views.unit(views.counter_hash(stream, SEED, ids, batch.view))
            for stream in (views.Stream.BRIGHTNESS, views.Stream.CONTRAST, views.Stream.SATURATION)
        ]
        for image, sample, *factors in zip(as_pixels(batch.images), ids.tolist(), *drawn):
            brightness, contrast, saturation = (1 + 0.5 * (2 * u - 1) for u in factors)
            pixels = np.clip(unaltered[sample].permute(1, 2, 0).numpy() * brightness, 0, 255)
            middle = (pixels @ gray).mean()
            pixels = np.clip(middle + contrast * (pixels - middle), 0, 255)
            grays = (pixels @ gray)[..., None]
            pixels = np.clip(grays + saturation * (pixels - grays), 0, 255)
            assert np.abs(image.permute(1, 2, 0).numpy() - pixels).max() <= 0.501
            differing += not torch.equal(image.round(), unaltered[sample])
        assert batch.labels.dtype == torch.int64
    assert differing > 8


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
def test_altered_images_do_not_depend_on_source_and_start(kind, mix, write_large_tree):
    root = write_large_tree()
    one, other = (list(large_source(root, name, mix=mix, jitter=0.3).batches(0, 6)) for name in ("torchvision", kind))
    (again,) = large_source(root, kind, mix=mix, jitter=0.3).batches(4, 5)
    for batch, twin in [*zip(one, other), (one[4], again)]:
        for name in ("sample_ids", "images", "labels"):
            assert torch.equal(getattr(batch, name), getattr(twin, name))


@pytest.mark.parametrize("kind", SOURCES)
def test_a_mixed_image_is_the_same_where_it_stands_in_for_a_bad_one(kind, write_large_tree):
    root = write_large_tree()
    (root / "train" / "bee" / "2.JPEG").write_bytes(b"")
    source = large_source(root, kind, on_bad_image="skip", mix="mixup")
    seen: dict[tuple[int, int], tuple] = {}
    twice = 0
    for batch in source.batches(0, 12):
        for sample, image, label in zip(batch.sample_ids.tolist(), batch.images, batch.labels):
            key = (sample, batch.view)
            twice += key in seen
            first = seen.setdefault(key, (image, label))
            assert torch.equal(image, first[0]) and torch.equal(label, first[1])
    assert twice >= 3  # sample 8 in each epoch, as itself and for sample 7


def test_impossible_alterations_are_refused():
    for fields in (dict(jitter=1.5), dict(mix="cutout"), dict(mix="mixup", mix_alpha=0.0)):
        with pytest.raises(ConfigError):
            Augmentation("pad_crop", flip=True, padding=2, **fields)
    with pytest.raises(ConfigError, match="number of classes"):
        TrainSource(
            resident_source().split, Augmentation("pad_crop", flip=True, mix="mixup"), MEAN, STD, batch_size=4, seed=0
        )
