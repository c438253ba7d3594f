import itertools
import random
import time

import pytest

from stablekd_fast.cache.columns import Kept, Plan
from stablekd_fast.cache.speed import CodecCost, TierCost
from stablekd_fast.planning.rows import Costs, OutputCost, StageCost, best_plan, decisions, fits, predict


def random_costs(outputs: int, seed: int, stages: int = 2, tiers=("device", "host", "disk")) -> Costs:
    draw = random.Random(seed)
    made = []
    for k in range(outputs):
        size = draw.choice([2_000, 8_000, 30_000])
        codecs = {
            "fp32": CodecCost(4 * size, 1e-4, draw.uniform(0, 1e-4), draw.choice([0.0, 0.5, 1.0])),
            "int8": CodecCost(size, draw.uniform(0, 2e-4), draw.uniform(0, 3e-4), draw.choice([0.0, 1.0]), exact=False),
        }
        made.append(OutputCost(f"cut{k}", draw.uniform(1e-4, 4e-3), codecs, bridged=draw.random() < 0.3))
    rates = {
        "device": TierCost({"device": 1e-12}, {"device": 1e-12}, draw.choice([0, 3e8, 2e9])),
        "host": TierCost({"link": 5e-11}, {"link": 5e-11}, draw.choice([0, 1e9, 1e10])),
        "disk": TierCost({"link": 5e-11, "disk": 3e-10}, {"disk": 1e-9, "device": 1e-10}, draw.choice([0, 2e9, 1e11])),
    }
    everything = frozenset(range(outputs))
    kinds = [everything, frozenset(k for k in everything if draw.random() < 0.7) or everything]
    planned = []
    for s in range(stages):
        batches = draw.randint(50, 500)
        planned.append(StageCost(draw.uniform(1e-3, 1e-2), kinds[s % 2], batches, draw.randint(0, batches)))
    return Costs(
        tuple(made),
        tuple(planned),
        {t: rates[t] for t in tiers},
        {"device": 1e-4, "loader": draw.uniform(0, 5e-3)},
        10_000,
        128,
    )


def brute_force(costs: Costs) -> float:
    options = [[None, *costs.options(k)] for k in range(len(costs.outputs))]
    plans = (Plan({k: o for k, o in enumerate(chosen) if o}) for chosen in itertools.product(*options))
    return min(predict(costs, plan).seconds for plan in plans if fits(costs, plan))


@pytest.mark.parametrize("seed", range(30))
def test_the_plan_is_as_good_as_the_best_of_all(seed):
    costs = random_costs(4, seed)
    plan = best_plan(costs)
    assert fits(costs, plan)
    assert predict(costs, plan).seconds == pytest.approx(brute_force(costs), rel=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_twelve_outputs_are_as_good_as_the_best_of_all(seed):
    """Two choices each, so that all 4096 plans can be tried."""
    costs = random_costs(12, seed, tiers=("disk",))
    made = [OutputCost(o.name, o.block, {"fp32": o.codecs["fp32"]}, o.bridged) for o in costs.outputs]
    costs = Costs(tuple(made), costs.stages, costs.tiers, costs.images, costs.rows, costs.batch_size)
    assert predict(costs, best_plan(costs)).seconds == pytest.approx(brute_force(costs), rel=1e-12)


@pytest.mark.slow
def test_twelve_outputs_with_all_tiers_and_codecs_take_seconds_at_most():
    start = time.perf_counter()
    for seed in range(3):
        costs = random_costs(12, seed, stages=3)
        assert predict(costs, best_plan(costs)).seconds <= predict(costs, Plan()).seconds
    assert time.perf_counter() - start < 30


def simple(disk: float, read: float, fill: int = 100, stored: float = 0.0) -> Costs:
    """Two blocks of 10 ms, students of 5 ms; 100 of 1000 batches fill."""
    codecs = {"fp32": CodecCost(1000, 0.0, 0.0, stored)}
    outputs = tuple(OutputCost(name, 0.010, codecs) for name in ("layer1", "logits"))
    tier = TierCost({"device": read}, {"device": 1e-9}, disk)
    stages = (StageCost(0.005, frozenset({0, 1}), 1000, fill),)
    return Costs(outputs, stages, {"disk": tier}, {}, 1000, 100)


def test_prediction_by_hand():
    costs = simple(1e9, read=1e-8)  # 1 ms to read, 0.1 ms to write a batch of either output
    assert predict(costs, Plan()).seconds == pytest.approx(1000 * 0.025)
    both = Plan({0: Kept("disk", "fp32"), 1: Kept("disk", "fp32")})
    assert predict(costs, both).seconds == pytest.approx(100 * (0.025 + 0.0002) + 900 * 0.007)
    first = Plan({0: Kept("disk", "fp32")})
    assert predict(costs, first).seconds == pytest.approx(100 * (0.025 + 0.0001) + 900 * (0.005 + 0.001 + 0.010))
    last = Plan({1: Kept("disk", "fp32")})
    assert predict(costs, last).seconds == pytest.approx(100 * (0.025 + 0.0001) + 900 * (0.005 + 0.010 + 0.001))


def test_what_does_not_pay_is_not_kept():
    assert best_plan(simple(1e9, read=1e-8)).kept.keys() == {0, 1}
    assert best_plan(simple(1e9, read=2e-7)).kept == {}  # reading takes 20 ms, computing 10
    assert best_plan(simple(0, read=1e-8)).kept == {}
    assert len(best_plan(simple(1.5e6, read=1e-8)).kept) == 1  # the budget holds one of the two
    assert best_plan(simple(1e9, read=1e-8, fill=1000)).kept == {}  # never read again
    assert best_plan(simple(1e9, read=1e-8, fill=1000, stored=1.0)).kept.keys() == {0, 1}  # stored by an earlier run


def test_a_lossy_or_bridged_row_is_no_place_to_go_on_from():
    outputs = (
        OutputCost("a", 0.010, {"int8": CodecCost(10, 0.0, 0.0, exact=False)}),
        OutputCost("b", 0.010, {"fp32": CodecCost(10**9, 0.0, 0.0)}),
    )
    tier = TierCost({"disk": 1e-12}, {"disk": 1e-12}, 1e6)
    costs = Costs(outputs, (StageCost(0.0, frozenset({0, 1}), 10, 0),), {"disk": tier}, {}, 100, 100)
    kept = Plan({0: Kept("disk", "int8")})
    assert predict(costs, kept).seconds == pytest.approx(10 * 0.020)  # from the images all the same
    assert best_plan(costs).kept == {}


def test_decisions_say_where_the_teacher_goes_on():
    costs = simple(1.5e6, read=1e-8)
    rows = decisions(costs, Plan({0: Kept("disk", "fp32")}))
    assert [row["decision"] for row in rows] == ["keep (disk, fp32)", "recompute from layer1"]
    assert rows[0]["live_ms"] == pytest.approx(10) and rows[0]["kept_ms"] == pytest.approx(1)
    assert [row["decision"] for row in decisions(costs, Plan())] == ["relay", "relay"]


def test_a_plan_survives_json():
    plan = Plan({2: Kept("host", "int8"), 0: Kept("disk", "fp32")})
    assert Plan.from_plain(plan.plain()) == plan


def test_every_cost_is_counted_once_and_where_it_belongs():
    """All costs differ and none is zero; milliseconds per batch of 100 rows, added up by hand."""
    a = OutputCost("a", 0.010, {"fp32": CodecCost(1000, 0.0003, 0.0007, stored=0.25)})
    b = OutputCost("b", 0.020, {"int8": CodecCost(300, 0.0011, 0.0013, exact=False)})
    c = OutputCost("c", 0.040, {"fp16": CodecCost(700, 0.0017, 0.0019)}, bridged=True)
    tiers = {
        "disk": TierCost({"disk": 1e-8, "link": 2e-8}, {"disk": 4e-8, "device": 3e-8}, 1e12),
        "host": TierCost({"link": 5e-8}, {"link": 7e-8}, 1e12),
    }
    stages = (StageCost(0.005, frozenset({0, 1, 2}), 100, 30), StageCost(0.003, frozenset({2}), 50, 10))
    costs = Costs((a, b, c), stages, tiers, {"device": 0.001, "link": 0.0002, "loader": 0.008}, 1000, 100)
    plan = Plan({0: Kept("disk", "fp32"), 1: Kept("host", "int8"), 2: Kept("host", "fp16")})
    own = predict(costs, plan)

    def milliseconds(student, link, ahead, disk, loader=8.0):
        """What the device does `ahead` it does beside the `student`, and after the copies over the link."""
        device, feed = student + ahead, link + ahead
        return {"device": device / 1e3, "feed": feed / 1e3, "disk": disk / 1e3, "loader": loader / 1e3}

    # Filling. a: a quarter is on disk already, three quarters are computed, encoded, decoded and written. In memory
    # nothing is there yet: b and c are computed. The teacher goes on from each.
    of_a = 0.25 * 0.7 + 0.75 * (10 + 0.3 + 0.7) + 0.75 * 3.0
    of_b, of_c = 20 + 1.1 + 1.3, 40 + 1.7 + 1.9
    first = milliseconds(5, 0.2 + 0.25 * 2.0 + 2.1 + 4.9, 1 + of_a + of_b + of_c, 0.25 * 1.0 + 0.75 * 4.0)
    second = milliseconds(3, 0.2 + 4.9, 1 + 70 + 1.7 + 1.9, 0)  # c alone is wanted: all three blocks run for it
    assert own.filling[0] == pytest.approx(first) and own.filling[1] == pytest.approx(second)
    # Filled. Everything is read and decoded.
    assert own.filled[0] == pytest.approx(milliseconds(5, 0.2 + 2.0 + 1.5 + 3.5, 1 + 0.7 + 1.3 + 1.9, 1.0))
    assert own.filled[1] == pytest.approx(milliseconds(3, 0.2 + 3.5, 1 + 1.9, 0))
    busiest = 30 * first["feed"] + 70 * 0.0121 + 10 * second["feed"] + 40 * 0.008
    assert own.seconds == pytest.approx(busiest), "copies take longer than the students' steps"
    assert own.images_per_second(costs) == pytest.approx([100 / 0.0121, 100 / 0.008])
    # Without b: it is computed from a's row, which is exact; c from b's.
    part = predict(costs, Plan({0: Kept("disk", "fp32")}))
    assert part.filled[0] == pytest.approx(milliseconds(5, 0.2 + 2.0, 1 + 0.7 + 20 + 40, 1.0))
    # Without a: no row to go on from before b, and none behind b, as it is not exact.
    part = predict(costs, Plan({1: Kept("host", "int8")}))
    assert part.filled[0] == pytest.approx(milliseconds(5, 0.2 + 1.5, 1 + 10 + 1.3 + 60, 0))
    assert part.filled[0]["device"] == pytest.approx((1 + 5 + 10 + 1.3 + 20 + 40) / 1e3)
    shown = decisions(costs, plan)
    assert [(row["output"], row["decision"], row["row_bytes"]) for row in shown] == [
        ("a", "keep (disk, fp32)", 1000),
        ("b", "keep (host, int8)", 300),
        ("c", "keep (host, fp16)", 700),
    ]
    assert [row["live_ms"] for row in shown] == pytest.approx([10, 20, 60])
    assert [row["kept_ms"] for row in shown] == pytest.approx([2.0 + 0.7, 1.5 + 1.3, 3.5 + 1.9])
    assert [row["gigabytes"] for row in shown] == pytest.approx([1e-3, 3e-4, 7e-4])


@pytest.mark.parametrize("device, link, rest, seconds", [(5, 3, 4, 9), (5, 8, 4, 12), (5, 8, 0, 8), (5, 0, 4, 9)])
def test_copies_hide_behind_the_step_and_the_teacher_behind_nothing(device, link, rest, seconds):
    """One output is copied over the link, the next is computed; both beside the students' steps. Milliseconds."""
    outputs = (
        OutputCost("kept", 0.1, {"fp32": CodecCost(1, 0.0, 0.0)}),
        OutputCost("computed", rest / 1e3, {"fp32": CodecCost(1, 0.0, 0.0)}),
    )
    stages, tiers = (StageCost(device / 1e3, frozenset({0, 1}), 1, 0),), {"host": TierCost({"link": link / 1e3}, {}, 9)}
    costs = Costs(outputs, stages, tiers, {}, 1, 1)
    prediction = predict(costs, Plan({0: Kept("host", "fp32")}))
    assert prediction.seconds == pytest.approx(seconds / 1e3)
    assert seconds == max(device, link) + rest


def test_budgets_hold_all_rows_of_a_tier_together():
    a, b = (OutputCost(name, 0.01, {"fp32": CodecCost(1000, 0.0, 0.0)}) for name in "ab")
    stages = (StageCost(0.0, frozenset({0, 1}), 10, 0),)
    for budget, fitting in ((2_000_000, True), (1_999_999, False), (1_000_000, False)):
        costs = Costs((a, b), stages, {"host": TierCost({}, {}, budget)}, {}, 1000, 100)
        assert fits(costs, Plan({0: Kept("host", "fp32"), 1: Kept("host", "fp32")})) == fitting
        assert fits(costs, Plan({0: Kept("host", "fp32")}))
        assert len(best_plan(costs).kept) == 1 + fitting
