import numpy as np
import pytest
import torch
from PIL import Image

from stablekd_fast.data import EvalSource, open_dataset
from stablekd_fast.errors import ConfigError
from tests.data.reference import MEAN, STD, assert_within_a_level, normalised, scaled, small_split


def test_evaluation_shows_all_unchanged_in_order():
    split = small_split().subset(13, seed=0)
    batches = list(EvalSource(split, MEAN, STD, batch_size=5).batches())
    assert [len(batch.labels) for batch in batches] == [5, 5, 3]
    assert torch.equal(torch.cat([batch.sample_ids for batch in batches]), split.sample_ids)
    assert torch.equal(torch.cat([batch.labels for batch in batches]), split.labels)
    images = torch.cat([batch.images for batch in batches])
    expected = torch.stack([normalised(image.numpy()) for image in split.images])
    torch.testing.assert_close(images.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_of_large_images(write_large_tree, workers):
    split = open_dataset(write_large_tree(), image_size=56).test
    batches = list(EvalSource(split, MEAN, STD, batch_size=4, workers=workers).batches())
    assert [len(batch.labels) for batch in batches] == [4, 2]
    assert torch.equal(torch.cat([batch.sample_ids for batch in batches]), torch.arange(6))
    picture = Image.open(split.paths[0])
    scale = 64 / min(picture.size)
    width, height = (max(64, int(side * scale)) for side in picture.size)
    resized = scaled(np.asarray(picture), height, width)
    top, left = round((height - 56) / 2), round((width - 56) / 2)
    assert_within_a_level(batches[0].images[0], resized[top : top + 56, left : left + 56])
    (whole,) = EvalSource(split, MEAN, STD, batch_size=6, image_size=24).batches()
    assert whole.images.shape == (6, 3, 24, 24)


def test_evaluation_leaves_bad_large_images_out(write_large_tree):
    root = write_large_tree()
    bad = [root / "val" / "ant" / "0.JPEG", root / "val" / "ant" / "1.JPEG", root / "val" / "cat" / "0.JPEG"]
    for path in bad:
        path.write_bytes(b"")
    split = open_dataset(root, image_size=32, on_bad_image="skip").test
    batches = list(EvalSource(split, MEAN, STD, batch_size=2).batches())
    assert [batch.sample_ids.tolist() for batch in batches] == [[2, 3], [5]]
    assert [batch.labels.tolist() for batch in batches] == [[1, 1], [2]]
    assert [path for path, _ in split.skipped] == bad


def test_normalisation_and_size_must_fit():
    with pytest.raises(ConfigError, match="std above 0"):
        EvalSource(small_split(), MEAN, (0.2, 0.0, 0.2), batch_size=2)
    assert EvalSource(open_dataset("digits").test, MEAN, STD, batch_size=2, image_size=8).image_size == 8
    with pytest.raises(ConfigError, match="their own size, 5 x 6 pixels, got 8"):
        EvalSource(small_split(), MEAN, STD, batch_size=2, image_size=8)
