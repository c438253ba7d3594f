import json

import numpy as np
import pytest

from stablekd_fast.data import views
from tests.processes import output_of

MASK = (1 << 64) - 1

GOLDEN = {
    "hash": [17539276534738978496],
    "offsets": [[7, 7], [5, 7], [7, 3], [7, 5], [3, 5], [5, 8]],
    "flips": [True, True, True, True, False, True],
    "boxes": [[3, 55, 277, 210], [22, 54, 341, 367], [14, 152, 174, 193]],
    "order": [7, 9, 6, 0, 1, 5, 4, 8, 3, 2],
}


def reference_hash(*fields: int) -> int:
    """The documented formula in Python's unbounded integers."""

    def mix(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) & MASK
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
        return x ^ (x >> 31)

    state = mix(1)
    for field in fields:
        state = mix(state ^ (field & MASK))
    return state


@pytest.mark.parametrize("seed", [0, 7, -1, 2**63 + 5])
def test_hash_follows_its_documented_formula(seed):
    ids = np.array([0, 1, 2, 49_999, 2**40])
    got = views.counter_hash(3, seed, ids, 11)
    assert got.dtype == np.uint64
    assert got.tolist() == [reference_hash(3, seed, int(sample), 11) for sample in ids]


def test_first_splitmix_output_is_the_published_one():
    # SplitMix64 seeded with 0 starts with this number in every published implementation.
    assert int(views._mix(np.array([0], np.uint64))[0]) == 0xE220A8397B1DCDAF


def test_golden_values():
    """A change of these values changes every experiment: raise VIEW_VERSION and say so."""
    assert views.VIEW_VERSION == 1
    ids = np.arange(6)
    offsets, flips = views.crop_offsets_and_flips(5, ids, 2, padding=4)
    boxes = views.resized_crop_boxes(5, ids[:3], 2, np.full(3, 375), np.full(3, 500))
    assert views.counter_hash(1, 2, 3, 4).tolist() == GOLDEN["hash"]
    assert offsets.tolist() == GOLDEN["offsets"]
    assert flips.tolist() == GOLDEN["flips"]
    assert boxes.tolist() == GOLDEN["boxes"]
    assert views.epoch_order(5, 1, 10).tolist() == GOLDEN["order"]


def test_types_shapes_and_ranges():
    ids = np.arange(1000)
    offsets, flips = views.crop_offsets_and_flips(0, ids, 0, padding=3)
    assert offsets.dtype == np.int64 and offsets.shape == (1000, 2)
    assert flips.dtype == bool and flips.shape == (1000,)
    assert offsets.min() == 0 and offsets.max() == 6
    unflipped, no_flips = views.crop_offsets_and_flips(0, ids, 0, padding=3, flip=False)
    assert not no_flips.any() and np.array_equal(unflipped, offsets)
    centred, _ = views.crop_offsets_and_flips(0, ids, 0, padding=0)
    assert not centred.any()


def test_offsets_and_flips_are_uniform_and_independent():
    count = 81_000
    offsets, flips = views.crop_offsets_and_flips(1, np.arange(count), 0, padding=4)
    cells = np.bincount(offsets[:, 0] * 18 + offsets[:, 1] * 2 + flips, minlength=162)
    expected = count / 162
    chi_squared = ((cells - expected) ** 2 / expected).sum()
    # 161 degrees of freedom: mean 161, standard deviation 18; five of them are far beyond chance.
    assert 161 - 5 * 18 < chi_squared < 161 + 5 * 18


@pytest.mark.parametrize("changed", [dict(seed=1), dict(view=1)])
def test_another_seed_or_view_is_another_draw(changed):
    key = dict(seed=0, view=0)
    ids = np.arange(20_000)
    first, first_flips = views.crop_offsets_and_flips(sample_ids=ids, padding=4, **key)
    second, second_flips = views.crop_offsets_and_flips(sample_ids=ids, padding=4, **(key | changed))
    assert abs((first == second).mean() - 1 / 9) < 0.01
    assert abs((first_flips == second_flips).mean() - 1 / 2) < 0.02


def test_a_sample_owes_nothing_to_its_neighbours():
    whole, whole_flips = views.crop_offsets_and_flips(3, np.arange(50), 1, padding=4)
    part, part_flips = views.crop_offsets_and_flips(3, np.array([40, 7]), 1, padding=4)
    assert np.array_equal(part, whole[[40, 7]]) and np.array_equal(part_flips, whole_flips[[40, 7]])
    sizes = np.full(50, 300)
    boxes = views.resized_crop_boxes(3, np.arange(50), 1, sizes, sizes)
    assert np.array_equal(views.resized_crop_boxes(3, np.array([40]), 1, sizes[:1], sizes[:1])[0], boxes[40])


def test_boxes_lie_inside_and_follow_scale_and_ratio():
    rng = np.random.default_rng(0)
    heights, widths = rng.integers(100, 600, (2, 5000))
    boxes = views.resized_crop_boxes(0, np.arange(5000), 0, heights, widths)
    top, left, height, width = boxes.T
    assert boxes.dtype == np.int64
    assert (top >= 0).all() and (left >= 0).all() and (height > 0).all() and (width > 0).all()
    assert (top + height <= heights).all() and (left + width <= widths).all()
    fraction = height * width / (heights * widths)
    assert fraction.min() > 0.07 and fraction.max() <= 1.0
    # Rounding to whole pixels moves the ratio of the smallest boxes (28 pixels) by a few per cent.
    assert (width / height).min() > 0.70 and (width / height).max() < 1.42
    square = views.resized_crop_boxes(0, np.arange(5000), 0, np.full(5000, 500), np.full(5000, 500))
    wide = square[:, 3] > square[:, 2]
    assert abs(wide.mean() - 0.5) < 0.03


def test_box_of_an_extreme_shape_is_the_largest_centred_one():
    heights, widths = np.array([10, 1000]), np.array([1000, 10])
    boxes = views.resized_crop_boxes(0, np.arange(2), 0, heights, widths, scale=(1.0, 1.0))
    assert boxes.tolist() == [[0, 493, 10, 13], [493, 0, 13, 10]]


def test_epoch_order_is_a_permutation_that_changes_with_seed_and_epoch():
    orders = [views.epoch_order(seed, epoch, 1000) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for order in orders:
        assert order.dtype == np.int64
        assert np.array_equal(np.sort(order), np.arange(1000))
    for other in orders[1:]:
        assert (orders[0] == other).sum() < 10


def test_global_random_state_has_no_influence():
    np.random.seed(0)
    first = views.epoch_order(2, 3, 100)
    np.random.seed(1)
    np.random.rand(10)
    assert np.array_equal(views.epoch_order(2, 3, 100), first)


def test_another_process_draws_the_same():
    script = """
import json
import numpy as np
from stablekd_fast.data import views
ids = np.arange(200)
drawn = [*views.crop_offsets_and_flips(9, ids, 4, 4), views.resized_crop_boxes(9, ids, 4, ids + 100, 400 - ids),
         views.epoch_order(9, 4, 200)]
print(json.dumps([values.tolist() for values in drawn]))
"""
    there = output_of("-c", script)
    ids = np.arange(200)
    here = [
        *views.crop_offsets_and_flips(9, ids, 4, 4),
        views.resized_crop_boxes(9, ids, 4, ids + 100, 400 - ids),
        views.epoch_order(9, 4, 200),
    ]
    assert json.loads(there) == [values.tolist() for values in here]
