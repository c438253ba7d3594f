"""Flips, crops, random operations, interpolation and evaluation as settings: in every source that names views, and in
what rows depend on."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from stablekd_fast import distill, evaluate_file
from stablekd_fast.cache.fingerprint import image_fingerprint
from stablekd_fast.config import DistillConfig
from stablekd_fast.data import Augmentation, EvalSource, TrainSource, open_dataset
from stablekd_fast.data.augmentation import AugmentSettings, CropSettings, EvaluationSettings
from stablekd_fast.data.operations import OPERATIONS, erased, operated
from stablekd_fast.data.views import resized_crop_boxes
from stablekd_fast.errors import ConfigError, DataError
from stablekd_fast.run.builders import eval_source, train_source, training_stream

CPU = torch.device("cpu")
NO_CHANGE = (0.0,) * 3, (1 / 255,) * 3
LARGE = ["torchvision", pytest.param("dali", marks=pytest.mark.dali)]


def configured(**settings):
    return DistillConfig(method="ce", student="resnet20_half", batch_size=4, seed=7, validation=0.0, **settings)


def source_of(dataset, **settings):
    config = configured(**settings)
    return train_source(dataset, dataset.train, config, CPU)


def pictures(count=6, size=40):
    generator = np.random.default_rng(0)
    small = generator.integers(0, 256, (count, 5, 5, 3), dtype=np.uint8)
    scaled = [np.asarray(Image.fromarray(one).resize((size, size), Image.Resampling.BICUBIC)) for one in small]
    return torch.from_numpy(np.stack(scaled))


STRENGTHS = {
    "ShearX": lambda s: 0.3 * s, "ShearY": lambda s: 0.3 * s, "Rotate": lambda s: 30 * s,
    "TranslateX": lambda s: 150 / 331 * 40 * s, "TranslateY": lambda s: 150 / 331 * 40 * s,
    "Brightness": lambda s: 0.9 * s, "Color": lambda s: 0.9 * s, "Contrast": lambda s: 0.9 * s,
    "Sharpness": lambda s: 0.9 * s, "Posterize": lambda s: 8 - round(4 * abs(s)), "Solarize": lambda s: 1 - abs(s),
}  # fmt: skip


@pytest.mark.parametrize("strength", [0.3, -0.3, 1.0])
def test_each_operation_is_that_of_torchvision(strength):
    """In the order and with the strengths of its RandAugment."""
    names = list(v2.RandAugment._AUGMENTATION_SPACE)
    assert names == [
        "Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast",
        "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize",
    ]  # fmt: skip
    assert len(OPERATIONS) == len(names)
    transform = v2.RandAugment()
    for name, ours in zip(names, OPERATIONS):
        image = pictures()[0].permute(2, 0, 1).contiguous()
        magnitude = STRENGTHS.get(name, lambda s: 0.0)(strength)
        theirs = transform._apply_image_or_video_transform(
            image, name, magnitude, interpolation=v2.InterpolationMode.NEAREST, fill={}
        )
        assert torch.equal(ours(image, strength), theirs), name


def test_operations_are_drawn_from_the_view_and_not_from_threads():
    images, ids = pictures(), np.arange(6) * 3
    augmentation = Augmentation("pad_crop", flip=False, operations=2, magnitude=9)
    alone = operated(images, augmentation, 1, ids, 2)
    assert torch.equal(alone, operated(images, augmentation, 1, ids, 2, workers=3))
    assert torch.equal(alone[[4, 1]], operated(images[[4, 1]], augmentation, 1, ids[[4, 1]], 2))
    assert not torch.equal(alone, operated(images, augmentation, 1, ids, 3))
    assert not torch.equal(alone, operated(images, augmentation, 2, ids, 2))
    assert torch.equal(images, pictures()), "the given images stay"
    none = dataclasses.replace(augmentation, magnitude=0)
    changed = operated(images, none, 1, ids, 2)
    assert not torch.equal(alone, changed)


def test_all_operations_come_with_equal_odds():
    images = torch.zeros(4000, 1, 1, 3, dtype=torch.uint8)
    counts = [0] * len(OPERATIONS)
    kept = list(OPERATIONS)
    from stablekd_fast.data import operations

    def counting(place):
        def operation(image, strength):
            counts[place] += 1
            assert abs(abs(strength) - 0.5) < 1e-9
            return image

        return operation

    try:
        operations.OPERATIONS = tuple(counting(place) for place in range(len(kept)))
        operated(images, Augmentation("pad_crop", flip=False, operations=1, magnitude=15), 0, np.arange(4000), 0)
    finally:
        operations.OPERATIONS = tuple(kept)
    assert sum(counts) == 4000 and all(200 < count < 380 for count in counts)


def test_erasing_replaces_boxes_of_the_stated_sizes_by_the_mean():
    images = torch.full((3000, 50, 40, 3), 200, dtype=torch.uint8)
    augmentation = Augmentation("pad_crop", flip=False, erasing=0.25)
    mean = torch.tensor([10.4, 20.6, 30.0])
    changed = erased(images, augmentation, mean, 5, np.arange(3000), 1)
    gone = (changed != 200).any(3)
    hit = gone.flatten(1).any(1)
    assert 0.22 < hit.float().mean() < 0.28
    assert changed[gone].unique(dim=0).tolist() == [[10, 21, 30]]
    for box in gone[hit][:200]:
        rows, columns = box.any(1).nonzero().flatten(), box.any(0).nonzero().flatten()
        height, width = int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1
        assert int(box.sum()) == height * width, "it is a rectangle"
        assert 0.01 <= height * width / 2000 <= 0.36 and 0.2 <= height / width <= 4.5
    assert torch.equal(erased(images[7:9], augmentation, mean, 5, np.arange(7, 9), 1), changed[7:9])


def test_small_images_take_padding_flip_and_operations(write_tree):
    dataset = open_dataset(write_tree(size=(12, 12)))
    plain = source_of(dataset, flip=False, crop=CropSettings(padding=0))
    positions = np.arange(6)
    batch = plain.batch(positions, 0)
    same = (batch.pixels * torch.tensor(dataset.std).view(3, 1, 1) + torch.tensor(dataset.mean).view(3, 1, 1)) * 255
    assert torch.equal(same.round().to(torch.uint8).permute(0, 2, 3, 1), dataset.train.images[:6])
    flipped = source_of(dataset, flip=True, crop=CropSettings(padding=0)).batch(positions, 0)
    turned = [bool(torch.equal(a, b.flip(2))) and not torch.equal(a, b) for a, b in zip(flipped.pixels, batch.pixels)]
    assert any(turned) and not all(turned)
    changed = source_of(dataset, flip=False, crop=CropSettings(padding=0), augment=AugmentSettings(operations=2))
    assert not torch.equal(changed.batch(positions, 0).pixels, batch.pixels)
    with pytest.raises(ConfigError, match="crop.scale or crop.ratio was given, but these images are small ones"):
        source_of(dataset, crop=CropSettings(scale=[0.5, 1.0]))


@pytest.mark.parametrize("source", LARGE)
def test_large_images_take_boxes_and_interpolation(write_large_tree, source):
    dataset = open_dataset(write_large_tree(), image_size=32)
    settings = {"flip": False, "crop": CropSettings(scale=[0.9, 1.0], ratio=[1.0, 1.0]), "interpolation": "bicubic"}
    made = source_of(dataset, source=source, **settings)
    batch = made.batch(np.arange(4), 2)
    for sample, image in zip(batch.sample_ids.tolist(), batch.pixels):
        picture = torch.from_numpy(np.array(Image.open(dataset.train.paths[sample])))
        sides = np.array([picture.shape[0]]), np.array([picture.shape[1]])
        ((top, left, height, width),) = resized_crop_boxes(7, np.array([sample]), 2, *sides, (0.9, 1.0), (1.0, 1.0))
        cut = picture[top : top + height, left : left + width].permute(2, 0, 1)
        wanted = F.resize(cut, [32, 32], interpolation=v2.InterpolationMode.BICUBIC, antialias=True).float() / 255
        wanted = (wanted - torch.tensor(dataset.mean).view(3, 1, 1)) / torch.tensor(dataset.std).view(3, 1, 1)
        assert (image - wanted).abs().max() < 0.06, "within two or three levels"
    with pytest.raises(ConfigError, match="crop.padding was given, but these images are large ones"):
        source_of(dataset, crop=CropSettings(padding=2))


@pytest.mark.dali
def test_sources_of_named_views_agree_and_the_stream_refuses_by_name(write_large_tree):
    dataset = open_dataset(write_large_tree(), image_size=32)
    settings = {
        "crop": CropSettings(scale=[0.5, 1.0]), "augment": AugmentSettings(operations=1, erasing=0.5),
        "interpolation": "bicubic",
    }  # fmt: skip
    one, other = (source_of(dataset, source=source, **settings) for source in ("torchvision", "dali"))
    apart = (one.batch(np.arange(4), 1).pixels - other.batch(np.arange(4), 1).pixels).abs()
    assert apart.mean() < 0.02
    for name, value in settings.items():
        config = configured(source="dali-stream", **{name: value})
        with pytest.raises(ConfigError, match=f"given together with .*{name}"):
            training_stream(train_source(dataset, dataset.train, config, CPU), config)


def test_every_setting_is_in_the_fingerprint_of_rows(write_large_tree):
    dataset = open_dataset(write_large_tree(), image_size=32)
    changes = [
        {}, {"flip": False}, {"crop": CropSettings(scale=[0.2, 1.0])}, {"crop": CropSettings(ratio=[0.5, 2.0])},
        {"augment": AugmentSettings(operations=1)}, {"augment": AugmentSettings(operations=1, magnitude=10)},
        {"augment": AugmentSettings(erasing=0.1)}, {"interpolation": "bicubic"},
    ]  # fmt: skip
    told = [str(image_fingerprint(source_of(dataset, source="torchvision", **change))) for change in changes]
    assert len(set(told)) == len(told)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"crop": CropSettings(scale=[0.5])}, r"crop.scale=\[0.5\] was given; two numbers"),
        ({"crop": CropSettings(scale=[0.0, 1.0])}, "crop.scale is the least and the most of the area"),
        ({"crop": CropSettings(ratio=[2.0, 1.0])}, "crop.ratio is the least and the most"),
        ({"augment": AugmentSettings(operations=-1)}, "augment.operations=-1"),
        ({"augment": AugmentSettings(operations=1, magnitude=31)}, "augment.magnitude=31"),
        ({"augment": AugmentSettings(erasing=math.nan)}, "augment.erasing=nan"),
        ({"interpolation": "nearest"}, "interpolation='nearest'"),
    ],
)
def test_what_cannot_be_is_refused_by_name(write_large_tree, settings, said):
    dataset = open_dataset(write_large_tree(), image_size=32)
    with pytest.raises(ConfigError, match=said):
        source_of(dataset, **settings)


def test_evaluation_scales_and_cuts_as_it_is_told(write_large_tree):
    dataset = open_dataset(write_large_tree(), image_size=32)
    config = configured(evaluation=EvaluationSettings(resize=60, crop=48), interpolation="bicubic")
    batch = next(iter(eval_source(dataset, dataset.test, config).batches()))
    assert batch.pixels.shape[2:] == (48, 48)
    picture = Image.open(dataset.test.paths[0])
    short = min(picture.size)
    sides = [max(60, int(side * 60 / short)) for side in (picture.height, picture.width)]
    scaled = F.resize(F.pil_to_tensor(picture), sides, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    wanted = F.center_crop(scaled, [48, 48]).float() / 255
    wanted = (wanted - torch.tensor(dataset.mean).view(3, 1, 1)) / torch.tensor(dataset.std).view(3, 1, 1)
    assert (batch.pixels[0] - wanted).abs().max() < 0.06
    with pytest.raises(ConfigError, match="evaluation.resize=40 was given, which does not go with a cut of 48"):
        eval_source(dataset, dataset.test, configured(evaluation=EvaluationSettings(resize=40, crop=48)))
    digits = open_dataset("digits")
    with pytest.raises(ConfigError, match="evaluation.resize=40"):
        eval_source(digits, digits.test, configured(evaluation=EvaluationSettings(resize=40)))


def test_a_run_with_such_settings_is_evaluated_as_it_was(write_large_tree, tmp_path):
    settings = {
        "data": str(write_large_tree(train=8)), "image_size": 32, "epochs": 2.0, "batch_size": 8, "bn_images": 16,
        "crop": CropSettings(scale=[0.5, 1.0]), "augment": AugmentSettings(operations=2, erasing=0.5), "flip": False,
        "evaluation": EvaluationSettings(resize=48, crop=40), "interpolation": "bicubic", "validation": 0.0,
        "student": "resnet20_half", "method": "ce", "precision": "fp32",
    }  # fmt: skip
    result = distill(**settings, out=str(tmp_path / "out"), progress=False)
    for name in ("student", "checkpoint"):
        assert evaluate_file(tmp_path / "out" / f"{name}.safetensors").accuracy == result.accuracy


def test_a_subset_keeps_proportions_and_more_than_there_is_is_refused(write_tree):
    dataset = open_dataset(write_tree())
    assert dataset.train.subset(9, 0).labels.bincount().tolist() == [3, 3, 3]
    with pytest.raises(DataError, match="subset of 19 images from 18"):
        dataset.train.subset(19, 0)
    assert isinstance(TrainSource(dataset.train, dataset.augmentation, *NO_CHANGE, batch_size=2, seed=0), TrainSource)
    assert len(list(EvalSource(dataset.test, *NO_CHANGE, batch_size=4).batches())) == 2
