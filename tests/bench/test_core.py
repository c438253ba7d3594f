"""The bench core on a clock of its own, so that every number it reports is known beforehand."""

import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stablekd_fast.bench.core import (
    WARM_UP_ROUNDS,
    Case,
    Contender,
    WrongResult,
    check,
    measure,
    measure_cases,
    pinned,
    scratch,
)
from stablekd_fast.bench.floor import floor_contenders, split
from stablekd_fast.bench.peak import TOLERANCES, peak, peak_contenders

RIGHT = torch.tensor([1.0, -2.0])


class Machine:
    """A clock that only moves while contenders work; `pace` slows them all, and may change from round to round."""

    def __init__(self):
        self.now, self.pace, self.timed = 0.0, 1.0, []

    def clock(self):
        return self.now

    def watch(self, contender):
        self.timed.append(str(contender))

    def contender(self, name, seconds, variant="", result=RIGHT, **options):
        def call():
            self.now += self.pace * seconds
            return result

        return Contender(name, call, variant, **options)

    def measure(self, contenders, rounds=4, tolerance=1e-6, watch=None, **options):
        case = Case("bench", "case", contenders, "plain", lambda: RIGHT.double(), tolerance, **options)
        return measure(case, rounds, clock=self.clock, watch=watch or self.watch)


@pytest.fixture
def machine():
    return Machine()


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        (torch.tensor([1.0, -2.1]), "0.05 of the reference's largest magnitude"),
        (torch.tensor([float("nan"), -2.0]), "largest error of its result 0 is nan"),
        (torch.tensor([1.0]), "shapes [[1]]; [[2]] are expected"),
        ((RIGHT, RIGHT), "shapes [[2], [2]]; [[2]] are expected"),
    ],
)
def test_a_wrong_result_is_refused_before_anything_is_timed(machine, wrong, complaint):
    contenders = [machine.contender("plain", 1), machine.contender("fast", 1e-9, "reckless", result=wrong)]
    with pytest.raises(WrongResult) as refusal:
        machine.measure(contenders)
    assert "bench, case: fast (reckless)" in str(refusal.value) and complaint in str(refusal.value)
    assert machine.timed == []


def test_each_result_has_its_own_tolerance(machine):
    near = (RIGHT, RIGHT * 1.01)
    case = Case("b", "c", [machine.contender("plain", 1, result=near)], "plain", lambda: (RIGHT, RIGHT), (0.0, 0.02))
    check(case)
    with pytest.raises(WrongResult, match="result 1 is 0.01 "):
        check(Case("b", "c", case.contenders, "plain", case.expected, (0.02, 0.0)))


def test_a_contender_with_another_task_is_checked_against_its_own_reference(machine):
    other = machine.contender("other", 1, result=2 * RIGHT, expected=lambda: 2.1 * RIGHT, tolerance=0.1)
    machine.measure([machine.contender("plain", 1), other])
    strict = machine.contender("other", 1, result=2 * RIGHT, expected=lambda: 2.1 * RIGHT)
    with pytest.raises(WrongResult, match="other"):
        machine.measure([machine.contender("plain", 1), strict])


def test_contenders_take_turns_in_an_order_that_changes_and_is_repeatable(machine):
    names = ["plain", "a", "b", "c"]
    machine.measure([machine.contender(name, 1) for name in names], rounds=6)
    rounds = [machine.timed[i : i + 4] for i in range(0, len(machine.timed), 4)]
    assert len(rounds) == 6 + WARM_UP_ROUNDS
    assert all(sorted(order) == sorted(names) for order in rounds)
    assert len({tuple(order) for order in rounds}) > 2
    again = Machine()
    again.measure([again.contender(name, 1) for name in names], rounds=6)
    assert again.timed == machine.timed


def test_a_machine_that_slows_down_between_rounds_changes_no_ratio(machine):
    def watch(contender):
        machine.watch(contender)
        machine.pace = 1.0 + (len(machine.timed) - 1) // 3

    contenders = [machine.contender(name, s) for name, s in (("plain", 3.0), ("ours", 0.75), ("floor", 0.5))]
    plain, ours, floor = machine.measure(contenders, rounds=5, watch=watch, limit="floor")
    # Paces of the five rounds after two for warming up: 3, 4, 5, 6, 7; quartiles 4 and 6.
    assert plain["median_seconds"] == pytest.approx(15.0) and plain["spread_seconds"] == pytest.approx(3.0)
    assert ours["median_seconds"] == pytest.approx(3.75)
    assert [row["ratio"] for row in (plain, ours, floor)] == pytest.approx([1.0, 4.0, 6.0])
    assert [row["share_of_limit"] for row in (plain, ours, floor)] == pytest.approx([1 / 6, 2 / 3, 1.0])


def test_each_row_says_how_close_it_comes_to_its_own_limit(machine):
    contenders = [
        machine.contender("plain", 4.0, flops=100, limit="peak, fp32"),
        machine.contender("halves", 2.0, flops=100, limit="peak, fp16"),
        machine.contender("peak, fp32", 1.0, "many small", flops=20, limit="peak, fp32"),
        machine.contender("peak, fp32", 2.0, "few large", flops=50, limit="peak, fp32"),
        machine.contender("peak, fp16", 1.0, flops=100, limit="peak, fp16"),
    ]
    plain, halves, peak, _ = machine.measure(contenders, extras={"images": 8})
    assert peak["variant"] == "few large", "the faster one for the same work"
    assert (plain["limit"], plain["limit_seconds"], plain["share_of_limit"]) == ("peak, fp32", 4.0, 1.0)
    assert (halves["limit"], halves["limit_seconds"], halves["share_of_limit"]) == ("peak, fp16", 1.0, 0.5)
    assert plain["gflops_per_second"] == pytest.approx(25e-9) and plain["images_per_second"] == pytest.approx(2.0)


def test_a_refused_case_has_no_rows_and_the_others_are_measured(machine):
    wrong = Case("b", "wrong", [machine.contender("plain", 1, result=2 * RIGHT)], "plain", lambda: RIGHT, 0.0)
    right = Case("b", "right", [Contender("plain", lambda: RIGHT)], "plain", lambda: RIGHT, 0.0)
    shown = []
    measured = measure_cases([wrong, right], 1, shown.append)
    assert [row["case"] for row in measured.rows] == ["right"] and shown == [measured.rows]
    assert len(measured.refused) == 1 and "b, wrong: plain is wrong" in measured.refused[0]


def test_a_scratch_folder_is_gone_afterwards(tmp_path):
    with pytest.raises(KeyError), scratch(tmp_path) as own:
        own.mkdir()
        (own / "rows").touch()
        raise KeyError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("precision", TOLERANCES)
def test_the_peak_is_counted_and_right(precision):
    product, convolution = peak_contenders(precision)
    assert product.flops == 2 * 1024**3 and convolution.flops == 2 * 8 * 28 * 28 * 9 * 128 * 128
    check(Case("bench", "peak", [product, convolution], peak(precision), lambda: RIGHT, 0.0))


def test_the_fastest_variant_stands_for_its_name(machine):
    contenders = [
        machine.contender("plain", 4.0, "slow"),
        machine.contender("plain", 2.0, "fast"),
        machine.contender("ours", 1.0, extras={"bytes": 12}),
    ]
    rows = machine.measure(contenders, extras={"bytes": 8})
    assert [(row["contender"], row["variant"], row["ratio"], row["bytes"]) for row in rows] == [
        ("plain", "fast", 1.0, 8),
        ("ours", "", 2.0, 12),
    ]
    assert all(row["baseline"] == "plain" and "limit" not in row for row in rows)


def test_short_calls_are_repeated_and_long_ones_not(machine):
    plain, short = machine.measure([machine.contender("plain", 1.0), machine.contender("short", 1e-5)])
    assert plain["calls"] == 1 and plain["median_seconds"] == pytest.approx(1.0)
    assert 200 <= short["calls"] <= 201 and short["median_seconds"] == pytest.approx(1e-5)


def test_preparation_is_done_for_every_timing_and_not_timed(machine):
    prepared = []

    def prepare():
        machine.now += 100.0
        prepared.append(None)

    (row,) = machine.measure([machine.contender("plain", 1.0, prepare=prepare)], rounds=3)
    assert row["median_seconds"] == pytest.approx(1.0)
    assert len(prepared) == 1 + WARM_UP_ROUNDS + 3  # the first one is the check's


def test_garbage_is_not_collected_while_timing(machine):
    enabled = []
    machine.measure([machine.contender("plain", 1.0)], watch=lambda _: enabled.append(gc.isenabled()))
    assert not any(enabled) and gc.isenabled()


def test_threads_are_pinned_and_given_back():
    before = torch.get_num_threads()
    with pinned(before + 1) as settings:
        assert torch.get_num_threads() == settings["threads"] == before + 1
    assert torch.get_num_threads() == before


@given(reads=st.integers(1, 200), writes=st.integers(1, 200))
def test_a_floor_reads_and_writes_what_it_should(reads, writes):
    traffic = split(reads, writes)
    assert min(traffic) >= 0
    assert 2 * traffic.added + traffic.copied + traffic.summed == reads
    assert traffic.added + traffic.copied + traffic.filled == writes


@pytest.mark.parametrize(("read", "written"), [(8000, 4000), (4004, 4000), (1000, 4000), (20000, 4000), (4, 4)])
def test_every_variant_of_the_floor_gives_the_numbers_it_should(read, written):
    contenders = floor_contenders(read, written, "cpu")
    check(Case("bench", "floor", contenders, "floor", lambda: RIGHT, 0.0))


def test_a_floor_that_leaves_out_work_is_refused():
    honest = floor_contenders(8000, 4000, "cpu")[0]
    lazy = Contender("floor", lambda: torch.ones(1000), expected=honest.expected, tolerance=honest.tolerance)
    with pytest.raises(WrongResult, match="floor"):
        check(Case("bench", "floor", [lazy], "floor", lambda: RIGHT, 0.0))
