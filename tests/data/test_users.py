"""Users and items: how interactions are read and divided, and the batches that are made of them."""

import numpy as np
import pytest
import torch

from stablekd_fast.data import open_dataset
from stablekd_fast.data.augmentation import Augmentation
from stablekd_fast.data.formats.interactions import divided, made_up, read_interactions
from stablekd_fast.data.user_source import UNCHANGED, UserEvalSource, UserSource
from stablekd_fast.data.users import SEEN, TO_BE_FOUND, UNPOPULAR
from stablekd_fast.errors import ConfigError, DataError
from stablekd_fast.objectives.popularity import popularity_groups

CHANNELS = ((0.0,) * 3, (1.0,) * 3)
FILE = """item_id:token\tuser_id:token\trating:float
b\tu1\t5
a\tu1\t4
a\tu1\t4.5
c\tu1\t3
a\tu2\t4
"""


@pytest.fixture(scope="module")
def parts():
    return divided(made_up())


def test_a_file_of_ratings(tmp_path):
    path = tmp_path / "few.inter"
    path.write_text(FILE)
    found = read_interactions(path)
    assert found.names == ["a", "b"]  # c was liked by nobody
    assert list(zip(found.users.tolist(), found.items.tolist())) == [(0, 0), (0, 1), (1, 0)]
    dataset = open_dataset(path)
    assert dataset.name == "few" and dataset.classes == ["a", "b"] and dataset.train.total == 2
    assert dataset.popularity.tolist() == [2, 1] and len(dataset.test) == 0  # too few items to be divided


def test_a_file_without_ratings_counts_every_line(tmp_path):
    path = tmp_path / "all.inter"
    path.write_text("user_id:token\titem_id:token\n1\t2\n1\t3\n")
    assert read_interactions(path).items.tolist() == [0, 1]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "user_id is needed"),
        ("user_id:token\tfilm:token\n1\t2\n", "item_id is needed"),
        ("user_id:token\titem_id:token\n1\t2\n1\n", "Line 3 of .* has 1 fields"),
        ("user_id:token\titem_id:token\trating:float\n1\t2\tgood\n", "rating 'good', which is no number"),
        ("user_id:token\titem_id:token\trating:float\n1\t2\t1\n", "no interaction with a rating of 4"),
    ],
)
def test_what_is_no_file_of_interactions_is_said(tmp_path, text, message):
    path = tmp_path / "bad.inter"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        open_dataset(path)


def test_users_have_no_image_size():
    with pytest.raises(DataError, match="image_size=32 was given, but interactions has users"):
        open_dataset("interactions", image_size=32)


def test_what_is_made_up_is_the_same_each_time_and_favours_some_items():
    one, other = made_up(seed=3), made_up(seed=3)
    assert np.array_equal(one.users, other.users) and np.array_equal(one.items, other.items)
    assert not np.array_equal(one.items, made_up(seed=4).items[: len(one.items)])
    counts = np.bincount(one.users)
    assert counts.min() >= 10 and counts.max() <= 50
    assert len(np.unique(one.users * 400 + one.items)) == len(one.users)
    shown = np.sort(np.bincount(one.items, minlength=400))[::-1]
    assert shown[:100].sum() > 0.5 * shown.sum()


def test_items_are_divided_into_three_parts(parts):
    found = made_up()
    everything = torch.zeros(600, 400, dtype=torch.int8)
    everything[torch.from_numpy(found.users), torch.from_numpy(found.items)] = 1
    train, held_out, tested = parts.train.labels, parts.validation.labels, parts.test.labels
    assert torch.equal(train + (held_out > 0) + (tested > 0), everything)
    counts = everything.sum(1)
    assert torch.equal((tested > 0).sum(1), torch.ceil(counts * 0.2).long())
    assert torch.equal((held_out > 0).sum(1), torch.ceil(counts * 0.1).long())
    # In the test both other parts are known, while training the training part alone is.
    assert torch.equal(held_out == SEEN, train > 0) and torch.equal(tested == SEEN, (train > 0) | (held_out > 0))
    unpopular = popularity_groups(train.sum(0), 4) == 3
    assert ((tested == UNPOPULAR).any(0) <= unpopular).all() and ((tested == TO_BE_FOUND).any(0) <= ~unpopular).all()
    assert torch.equal(parts.popularity, train.sum(0))


def test_parts_of_users_keep_their_numbers(parts):
    rest, held_out = parts.train.holdout(100, 0)
    assert len(rest) == 500 and len(held_out) == 100
    assert sorted([*rest.sample_ids.tolist(), *held_out.sample_ids.tolist()]) == list(range(600))
    assert torch.equal(held_out.labels, parts.train.labels[held_out.sample_ids])
    assert torch.equal(held_out.images, held_out.sample_ids) and held_out.total == rest.total == 600
    assert rest.identity() == parts.train.identity() != parts.test.identity()
    assert len(parts.train.subset(0.5, 0)) == 300


def test_batches_of_users(parts):
    source = UserSource(parts.train, UNCHANGED, *CHANNELS, batch_size=64, seed=0)
    assert source.steps_per_epoch == 9 and source.views == 1 and source.choice.name == "users"
    batches = list(source.batches(0, 20, torch.bfloat16))
    for batch in batches:
        assert batch.view == 0 and batch.images.dtype == torch.int64 and torch.equal(batch.images, batch.sample_ids)
        assert batch.labels.dtype == torch.float32 and torch.equal(
            batch.labels, parts.train.labels[batch.images].float()
        )
    assert len(torch.cat([batch.images for batch in batches[:9]]).unique()) == 576
    (again,) = source.batches(13, 14)
    assert torch.equal(again.images, batches[13].images)
    halves = [next(source.part(rank, 2).batches(13, 14)).images for rank in (0, 1)]
    assert torch.equal(torch.cat(halves), batches[13].images)
    (without,) = source.batches(13, 14, needed=lambda ids, view: False)
    assert without.images is None and torch.equal(without.labels, batches[13].labels)


def test_batches_to_evaluate_on(parts):
    source = UserEvalSource(parts.test, *CHANNELS, batch_size=128)
    batches = list(source.batches())
    assert torch.equal(torch.cat([batch.images for batch in batches]), parts.test.sample_ids)
    assert torch.equal(torch.cat([batch.labels for batch in batches]), parts.test.labels)


def test_what_changes_images_is_refused(parts):
    with pytest.raises(ConfigError, match="the data set has users"):
        UserSource(parts.train, Augmentation("pad_crop", flip=True), *CHANNELS, batch_size=64, seed=0)
