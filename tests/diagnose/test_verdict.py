"""Figures and words from planted rows, whose truth is known."""

import dataclasses
import math

import pytest
from scipy import stats

from stablekd_fast.blocks.pair import Cut
from stablekd_fast.diagnose.settings import DECOMPOSED, END_TO_END
from stablekd_fast.diagnose.summary import Interval, interval, ratio_interval, summarise
from stablekd_fast.diagnose.training import Measurements
from stablekd_fast.diagnose.verdict import judge

CUTS = [Cut("layer1", "layer1", (8,), (8,)), Cut("features.3", "layer2", (8,), (8,))]
SEEDS, STEPS = 4, [5, 15, 25, 35]


def planted(
    entanglement=0.4, gain=2.0, composed=0.8, taken=0.3, weak_cut=1.0, exposure=3.0, spread=0.02, fall=0.5
) -> Measurements:
    """Rows of three blocks: signal-to-noise 0.25 end to end, `gain` times that decomposed; the composed student's
    losses are `composed` times those of end to end, and from look to look `fall` times what they were; the first cut
    takes away `taken`, the second `weak_cut` of that.
    """
    blocks, between = [], []
    for seed in range(SEEDS):
        off = 1 + spread * (seed - (SEEDS - 1) / 2)
        for look, step in enumerate(STEPS):
            for arm, snr, loss in ((END_TO_END, 0.25, 1.0), (DECOMPOSED, 0.25 * gain * off, composed * off)):
                row = {
                    "arm": arm, "seed": seed, "step": step, "own_change": 0.6 * off, "cosine": 0.9 * off,
                    "curvature": 2.0 * off, "entanglement": entanglement * off if arm == END_TO_END else 0.0,
                    "signal_share": snr / (1 + snr), "drift": None if look == 0 else 0.1,
                }  # fmt: skip
                losses = {"composed_loss": loss * fall**look, "loss": loss * fall**look / exposure}
                blocks += [{"block": k, **row, **losses} for k in range(3)]
            for cut, share in enumerate((1.0, weak_cut)):
                between.append(
                    {"arm": END_TO_END, "seed": seed, "step": step, "cut": cut, "entanglement": taken * share * off}
                )
    return Measurements(CUTS, "fp32", blocks, between)


def verdict_on(**rows):
    return judge(summarise(planted(**rows)), CUTS, 40)


def test_figures_are_what_was_planted():
    summary = summarise(planted())
    assert summary.gap.mean == pytest.approx(0.4) and summary.others_share.mean == pytest.approx(0.4)
    assert summary.snr_gain.mean == pytest.approx(2.0, rel=1e-3) and summary.loss_ratio.mean == pytest.approx(
        0.8, rel=1e-3
    )
    first = summary.blocks[0]
    assert first[END_TO_END]["snr"].mean == pytest.approx(0.25) and first[DECOMPOSED]["snr"].mean == pytest.approx(0.5)
    assert first[END_TO_END]["drift"].mean == pytest.approx(0.1)
    assert [cut["exposure"].mean for cut in summary.cuts] == pytest.approx([3.0, 3.0])
    assert summary.settled == (35,) * SEEDS, "an eighth of the fall is left at 25, nothing at 35"


def test_the_last_block_does_not_count_for_the_noise():
    measured = planted(gain=2.0)
    for row in measured.blocks:
        if row["block"] == 2 and row["arm"] == DECOMPOSED:
            row["signal_share"] = 0.01
    assert summarise(measured).snr_gain.mean == pytest.approx(2.0, rel=1e-3)


def test_intervals_are_student_s():
    values = [0.31, 0.42, 0.36, 0.5]
    low, high = stats.t.interval(0.95, 3, loc=sum(values) / 4, scale=stats.sem(values))
    found = interval(values)
    assert (found.low, found.high) == pytest.approx((low, high)) and found.values == tuple(values)
    ratio = ratio_interval([0.5, 2.0])
    assert ratio.mean == pytest.approx(1.0) and ratio.low * ratio.high == pytest.approx(1.0)
    assert interval([1.0, math.nan]) is None and ratio_interval([1.0, 0.0]) is None


def test_an_interval_holds_the_truth_as_often_as_it_says():
    """95% ± 2% of 2000 intervals over three normal seeds hold the mean (four standard errors)."""
    draws = stats.norm.rvs(loc=1.0, scale=0.3, size=(2000, 3), random_state=0)
    held = sum(found.low <= 1.0 <= found.high for found in map(interval, draws.tolist()))
    assert abs(held / 2000 - 0.95) < 0.02


@pytest.mark.parametrize(
    "rows, helps",
    [
        ({}, "yes"),
        ({"gain": 1.0}, "yes"),
        ({"composed": 1.0}, "unclear"),
        ({"gain": 0.5}, "unclear"),
        ({"composed": 1.5}, "no"),
        ({"gain": 0.5, "composed": 1.5}, "no"),
        ({"gain": 1.0, "composed": 1.5}, "no"),
        ({"entanglement": 0.0}, "no"),
        ({"entanglement": 0.01}, "no"),
    ],
)
def test_planted_cases_are_judged_by_their_intervals(rows, helps):
    verdict = verdict_on(**rows)
    assert verdict.helps == helps
    begins = {
        "yes": "Decomposition should help",
        "no": "Decomposition should not",
        "unclear": "These figures do not settle",
    }
    assert verdict.headline.startswith(begins[helps])


def test_wide_intervals_settle_nothing():
    assert verdict_on(gain=1.1, composed=0.9, spread=0.5).helps == "unclear"


def test_sentences_carry_the_figures():
    entangled, noise, loss = verdict_on().why
    assert "gap 0.4 (95% interval 0.384 to 0.416)" in entangled and "40% of" in entangled
    assert "cleaner" in noise and "×2 (95%" in noise
    assert "After 40 steps" in loss and "is lower" in loss and "×0.8" in loss
    assert "noisier" in verdict_on(gain=0.5).why[1] and "is higher" in verdict_on(composed=1.5).why[2]
    assert "little to take away" in verdict_on(entanglement=0.01).why[0]
    assert "includes zero" in verdict_on(spread=0.6).why[0]


def test_weak_cuts_are_named_and_the_rest_can_be_pasted():
    assert "keep all" in verdict_on(weak_cut=0.9).cuts
    said = verdict_on(weak_cut=0.1).cuts  # of 0.3
    assert "crosses features.3/layer2: 0.03 (95%" in said and """--cuts '["layer1"]'""" in said
    measured = planted()
    for row in measured.between:
        row["entanglement"] *= 0.1 if row["cut"] == 0 else 1.0
    assert """--cuts '[["features.3", "layer2"]]'""" in judge(summarise(measured), CUTS, 40).cuts
    assert "--cuts" not in verdict_on(weak_cut=0.0, taken=0.01).cuts


def test_how_long_is_where_the_loss_settles():
    assert "after 88% of the steps (seeds: 35 to 35 of 40 steps)" in verdict_on().how_long
    assert "after 38% of the steps" in verdict_on(fall=0.05).how_long
    assert "in 4 of 4 seeds" in verdict_on(fall=1.2).how_long and "Merge early" in verdict_on(fall=1.2).how_long


def test_what_could_not_be_measured_is_said():
    summary = dataclasses.replace(summarise(planted()), snr_gain=None, loss_ratio=None)
    verdict = judge(summary, CUTS, 40)
    assert verdict.helps == "unclear" and "--probe-batches" in verdict.why[1] and "could not" in verdict.why[2]
    verdict = judge(dataclasses.replace(summary, gap=None), CUTS, 40)
    assert verdict.helps == "unclear" and "could not be measured" in verdict.why[0]


def test_an_interval_is_written_with_its_ends():
    assert str(Interval(0.5, 0.25, 1.0, (0.5,))) == "0.5 [0.25, 1]"
