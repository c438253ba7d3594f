import numpy as np
import pytest
import torch

from stablekd_fast.data import Split, open_dataset
from stablekd_fast.errors import DataError


def make_split(sizes: list[int]) -> Split:
    """Classes of the given sizes in mixed order; every pixel holds the sample id modulo 256."""
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    marks = (np.arange(len(labels)) % 256).astype(np.uint8)
    images = np.repeat(marks, 4 * 4 * 3).reshape(-1, 4, 4, 3)
    return Split(torch.from_numpy(labels), images=torch.from_numpy(images))


@pytest.mark.parametrize(
    "sizes, count, quotas",
    [
        ([100, 100, 100], 30, [10, 10, 10]),
        ([100, 100, 100], 31, [11, 10, 10]),
        ([50, 30, 20], 10, [5, 3, 2]),
        ([50, 30, 20], 7, [4, 2, 1]),  # 3.5, 2.1, 1.4: the largest remainder gets the seventh
        ([7, 0, 3], 10, [7, 0, 3]),
        ([97, 2, 1], 1, [1, 0, 0]),
    ],
)
def test_subset_keeps_class_fractions_by_largest_remainder(sizes, count, quotas):
    part = make_split(sizes).subset(count, seed=0)
    assert len(part) == count
    assert part.labels.bincount(minlength=len(sizes)).tolist() == quotas


def test_subset_keeps_ids_labels_and_images_together():
    whole = make_split([300, 300])
    part = whole.subset(0.25, seed=4)
    assert len(part) == 150
    assert torch.equal(part.labels, whole.labels[part.sample_ids])
    assert torch.equal(part.images[:, 0, 0, 0].long(), part.sample_ids % 256)
    again = part.subset(20, seed=1)
    assert set(again.sample_ids.tolist()) <= set(part.sample_ids.tolist())
    assert torch.equal(again.images[:, 0, 0, 0].long(), again.sample_ids % 256)


def test_seed_decides_the_subset():
    whole = make_split([100, 100])
    first, same, other = (whole.subset(50, seed=seed).sample_ids.tolist() for seed in (0, 0, 1))
    assert first == same
    assert len(set(first) & set(other)) < 25


def test_smaller_subsets_of_one_seed_lie_within_larger_ones():
    whole = make_split([100, 100])
    direct, by_steps = whole.subset(20, seed=3), whole.subset(50, seed=3).subset(20, seed=3)
    assert torch.equal(direct.sample_ids, by_steps.sample_ids)


def test_subset_of_everything_is_everything():
    whole = make_split([5, 7])
    assert torch.equal(whole.subset(1.0, seed=0).sample_ids, whole.sample_ids)
    assert torch.equal(whole.subset(12, seed=0).sample_ids, whole.sample_ids)


def test_a_count_of_one_is_one_image_and_not_a_fraction():
    assert len(make_split([5, 7]).subset(1, seed=0)) == 1


@pytest.mark.parametrize("wanted", [13, 0, -1, 1.5, 0.0])
def test_impossible_subsets_are_refused(wanted):
    with pytest.raises(DataError, match="(?i)subset"):
        make_split([5, 7]).subset(wanted, seed=0)


def test_holdout_is_disjoint_complete_and_balanced():
    whole = make_split([60, 30, 10]).subset(50, seed=2)
    rest, held_out = whole.holdout(20, seed=0)
    assert held_out.labels.bincount().tolist() == [12, 6, 2]
    assert sorted(rest.sample_ids.tolist() + held_out.sample_ids.tolist()) == whole.sample_ids.tolist()
    assert torch.equal(held_out.images[:, 0, 0, 0].long(), held_out.sample_ids % 256)


@pytest.mark.parametrize("count", [0, 12, 20])
def test_impossible_holdouts_are_refused(count):
    with pytest.raises(DataError, match=f"hold out {count} of 12"):
        make_split([5, 7]).holdout(count, seed=0)


def test_large_images_are_not_given_out_as_an_array(write_large_tree):
    with pytest.raises(DataError, match="too large"):
        _ = open_dataset(write_large_tree()).train.images
