"""Who trains what, compared with trying everything."""

import dataclasses
import itertools
import json
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stablekd_fast.config import DistillConfig, objectives_of
from stablekd_fast.distributed import Layout
from stablekd_fast.engine.stage import DividedSteps
from stablekd_fast.errors import ConfigError
from stablekd_fast.planning.assign import GroupCost, ReduceCost, assign, best_layout, linear
from stablekd_fast.teacher.cached import CachedTeacher

seconds = st.floats(0.01, 10) | st.sampled_from([1.0, 2.0])
costs_and_places = st.lists(seconds, min_size=1, max_size=7).flatmap(
    lambda costs: st.tuples(st.just(costs), st.integers(1, min(len(costs), 4)))
)


def busiest(costs, chosen, places, feeds=None):
    """What groups of one place read in common counts once."""
    loads = []
    for number in range(places):
        own = [group for group, place in enumerate(chosen) if place == number]
        fed = {output: cost for group in own for output, cost in feeds[group].items()} if feeds else {}
        loads.append(sum(costs[group] for group in own) + sum(fed.values()))
    return max(loads)


@given(costs_and_places, st.lists(seconds, min_size=8, max_size=8))
def test_no_assignment_with_what_is_read_is_better(given, reading):
    """Group `k` reads the outputs `k - 1` and `k`, as blocks do."""
    costs, places = given
    feeds = [{output: reading[output] for output in (k - 1, k) if output >= 0} for k in range(len(costs))]
    tried = [c for c in itertools.product(range(places), repeat=len(costs)) if len(set(c)) == places]
    found = assign(costs, places, feeds)
    assert tuple(found) in tried
    assert busiest(costs, found, places, feeds) == pytest.approx(min(busiest(costs, c, places, feeds) for c in tried))


@pytest.mark.parametrize("neighbours", [False, True])
@given(costs_and_places)
def test_no_assignment_is_better(neighbours, given):
    costs, places = given
    tried = [
        chosen
        for chosen in itertools.product(range(places), repeat=len(costs))
        if len(set(chosen)) == places and (not neighbours or list(chosen) == sorted(chosen))
    ]
    found = assign(costs, places, neighbours=neighbours)
    assert tuple(found) in tried
    assert busiest(costs, found, places) == pytest.approx(min(busiest(costs, chosen, places) for chosen in tried))


@given(st.lists(st.floats(0.01, 10), min_size=17, max_size=60), st.integers(2, 16))
def test_many_groups_leave_no_place_more_than_one_group_above_the_mean(costs, places):
    found = assign(costs, places)
    assert set(found) == set(range(places))
    assert busiest(costs, found, places) <= sum(costs) / places + max(costs)


def group(seconds: float, teacher: float = 0.0, size: int = 0) -> GroupCost:
    return GroupCost(lambda images: seconds * images, lambda images: teacher * images, size)


def test_the_mesh_is_the_fastest_of_all():
    even, slow_link = [group(1.0, size=1000)] * 4, ReduceCost(0.0, 1.0)
    assert best_layout(even, 4, 8, slow_link) == Layout(4, 1, (0, 1, 2, 3), (8.0,) * 4)
    uneven, no_cost = [group(10.0), group(0.1)], ReduceCost()
    assert best_layout(uneven, 2, 8, no_cost).data == 2
    assert best_layout(uneven, 2, 8, no_cost, axis="blocks").blocks == 2
    assert best_layout(even, 4, 8, slow_link, axis="data").data == 4
    assert best_layout(uneven, 2, 8, no_cost, image_seconds=100.0).data == 2
    nearly_even = [group(1.0), group(1.1)]
    assert best_layout(nearly_even, 2, 8, no_cost).blocks == 2, "images are not divided for 5%"


def test_a_passed_on_teacher_keeps_neighbours_together_and_its_blocks_count():
    groups = [group(3.0), group(1.0, teacher=1.0), group(2.0), group(1.0, teacher=2.0)]
    found = best_layout(groups, 2, 1, ReduceCost(), live=True, axis="blocks")
    assert found.places == (0, 0, 1, 1) and found.seconds == (5.0, 5.0) and found.hands_on
    assert best_layout(groups, 2, 1, ReduceCost(), axis="blocks").seconds == (4.0, 3.0)


def test_what_two_groups_read_is_read_once_by_one_rank():
    groups = [
        dataclasses.replace(group(1.0), feeds=feeds)
        for feeds in ({0: 1.0}, {0: 1.0, 1: 0.5}, {1: 0.5, 2: 0.1}, {2: 0.1})
    ]
    found = best_layout(groups, 2, 2, ReduceCost(), axis="blocks")
    assert found.places == (0, 0, 1, 1) and found.seconds == (2 * (2 + 1.5), 2 * (2 + 0.6))
    assert best_layout(groups, 2, 2, ReduceCost(), axis="blocks", live=True).seconds == (4.0, 4.0), "nothing is read"


def test_a_batch_that_cannot_be_divided_is_refused():
    with pytest.raises(ConfigError, match="multiple of 4"):
        best_layout([group(1.0)], 4, 6, ReduceCost())


def test_an_all_reduce_costs_nothing_alone_and_what_a_ring_sends_otherwise():
    cost = ReduceCost(0.5, 2.0)
    assert cost.seconds(100, 1) == 0 and cost.seconds(100, 4) == 0.5 + 2.0 * 150


def test_costs_between_two_measured_sizes_lie_on_a_line():
    cost = linear((2, 3.0), (10, 7.0))
    assert cost(2) == 3.0 and cost(6) == 5.0 and linear((4, 2.0), (4, 2.0))(2) == 1.0


def test_ranks_count_along_the_data_axis_first():
    layout = Layout(2, 2, (0, 1, 0))
    assert [layout.groups_of(rank) for rank in range(4)] == [[0, 2], [0, 2], [1], [1]]
    assert [layout.part_of(rank) for rank in range(4)] == [0, 1, 0, 1]
    assert [layout.owner(number) for number in range(3)] == [0, 2, 0]


def test_a_layout_comes_back_from_a_checkpoint():
    """Under the names that checkpoints have had from the first."""
    layout = Layout(2, 1, (0, 1, 1), (0.5, 0.25), hands_on=True)
    plain = json.loads(json.dumps(layout.plain()))
    assert plain == {"blocks": 2, "data": 1, "places": [0, 1, 1], "seconds": [0.5, 0.25], "relays": True}
    assert Layout.from_plain(plain) == layout


@pytest.mark.parametrize("on_disk", [True, False], ids=["disk", "memory"])
def test_rows_in_memory_are_filled_by_each_process_and_rows_on_disk_by_the_one_that_stores_them(on_disk):
    columns = {k: SimpleNamespace(on_disk=on_disk, rows=None) for k in range(3)}
    teacher = SimpleNamespace(columns=columns, _writer=SimpleNamespace(settle=lambda: None))
    CachedTeacher.fill(teacher, {1})
    assert teacher._fills == ({1} if on_disk else {0, 1, 2})


def test_an_output_that_two_places_read_is_stored_by_the_first():
    """Block 0's output is the target of the first group and the input of the second."""
    objectives = objectives_of(DistillConfig())
    steps = [SimpleNamespace(group=[k], objectives=objectives) for k in range(3)]
    layout = Layout(blocks=3, data=1, places=(0, 1, 2))
    stored = [
        DividedSteps.stores(
            SimpleNamespace(layout=layout, ranks=SimpleNamespace(rank=k), steps=steps, own=[steps[k]]), 2
        )
        for k in range(3)
    ]
    assert stored == [{0}, {1}, {2}]
