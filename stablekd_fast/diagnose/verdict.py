"""Says in words what the figures mean."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from typing import Literal

from stablekd_fast.blocks.pair import Cut
from stablekd_fast.diagnose.summary import SETTLED, Interval, Summary

NEGLIGIBLE = 0.05
"""Entanglement below this part of a gradient's length leaves little to take away."""

Answer = Literal["yes", "no", "unclear"]


@dataclass(frozen=True)
class Verdict:
    """`helps` in one word, and sentences that give the reasons with their figures."""

    helps: Answer
    why: list[str]
    cuts: str
    how_long: str

    @property
    def headline(self) -> str:
        return {
            "yes": "Decomposition should help this pair.",
            "no": "Decomposition should not help this pair.",
            "unclear": "These figures do not settle whether decomposition helps this pair.",
        }[self.helps]


def judge(summary: Summary, cuts: list[Cut], steps: int) -> Verdict:
    """Return a verdict on trainings of `steps` steps.

    It is no if the gap is surely negligible or the composed student's loss surely worse decomposed. It is yes if the
    gap is surely above zero, that loss surely better, and the signal-to-noise ratio not surely worse. Surely means that
    the 95% interval over seeds says so. Cleaner gradients alone do not count: they were found where decomposition lost
    (docs/results/diagnose.md).
    """
    gap, noise, loss = summary.gap, _side(summary.snr_gain), _side(summary.loss_ratio)
    if (gap is not None and gap.high < NEGLIGIBLE) or loss > 0:
        helps: Answer = "no"
    elif gap is not None and gap.low > 0 and loss < 0 and noise >= 0:
        helps = "yes"
    else:
        helps = "unclear"
    why = [_entanglement(summary), _noise(summary.snr_gain), _loss(summary.loss_ratio, steps)]
    return Verdict(helps, why, _which_cuts(summary, cuts), _how_long(summary.settled, steps))


def _side(ratio: Interval | None) -> int:
    """Return 1 if a ratio is surely above 1, -1 if surely below, 0 if neither."""
    if ratio is None:
        return 0
    return (ratio.low > 1) - (ratio.high < 1)


def _entanglement(summary: Summary) -> str:
    gap, share = summary.gap, summary.others_share
    if gap is None:
        return "The entanglement gap could not be measured: a gradient was zero."
    text = (
        f"Entanglement gap {_range(gap)}: end to end, one step of the other blocks changes a block's gradient by "
        f"{gap.mean:.0%} of its length; decomposed, by nothing."
    )
    if gap.high < NEGLIGIBLE:
        return f"{text} There is little to take away."
    if gap.low <= 0:
        return f"{text} The interval includes zero; try more --seeds."
    if share is None:
        return text
    return f"{text} That is {share.mean:.0%} of all change, the rest being the block's own step."


def _noise(gain: Interval | None) -> str:
    if gain is None:
        return "Signal-to-noise ratios could not be compared: a gradient showed no signal. Try more --probe-batches."
    word = {1: "cleaner", -1: "noisier", 0: "neither surely cleaner nor noisier"}[_side(gain)]
    return f"Gradients of decomposed blocks are {word}: signal-to-noise ratio {_range(gain, '×')} that of end to end."


def _loss(ratio: Interval | None, steps: int) -> str:
    if ratio is None:
        return "The composed student's losses could not be compared."
    word = {1: "higher", -1: "lower", 0: "neither surely lower nor higher"}[_side(ratio)]
    return (
        f"After {steps} steps the loss that end-to-end training works on is {word} in the student composed of blocks "
        f"trained alone, before any merge: {_range(ratio, '×')}."
    )


def _which_cuts(summary: Summary, cuts: list[Cut]) -> str:
    weak = [row["entanglement"] is not None and row["entanglement"].high < NEGLIGIBLE for row in summary.cuts]
    if not any(weak):
        kept = "all" if len(cuts) > 1 else "it"
        return f"Cuts: keep {kept}; none surely takes away less than {NEGLIGIBLE:.0%} of a gradient's length."
    crossed = ", ".join(f"{row['cut']}: {_range(row['entanglement'])}" for row, out in zip(summary.cuts, weak) if out)
    both = [cut.teacher if cut.teacher == cut.student else [cut.teacher, cut.student] for cut in cuts]
    kept = [names for names, out in zip(both, weak) if not out]
    if not kept:
        return f"Cuts: hardly any entanglement crosses them ({crossed})."
    return f"Cuts: hardly any entanglement crosses {crossed}. Compare all cuts with --cuts '{json.dumps(kept)}'."


def _how_long(settled: tuple[int | None, ...], steps: int) -> str:
    known = [step for step in settled if step is not None]
    if len(known) < len(settled):
        return (
            f"How long: in {len(settled) - len(known)} of {len(settled)} seeds the composed student's loss did not "
            "fall while the blocks trained alone. Merge early, or cut less."
        )
    middle = statistics.median(known) / steps
    spread = f"seeds: {min(known)} to {max(known)} of {steps} steps"
    return (
        f"How long: the composed student's loss had all but {SETTLED:.0%} of its fall behind it after {middle:.0%} of "
        f"the steps ({spread}), while the learning rate fell to zero. Training blocks alone for longer does little for "
        "the whole student: merge no later than at that share of a run."
    )


def _range(value: Interval, sign: str = "") -> str:
    return f"{sign}{value.mean:.3g} (95% interval {value.low:.3g} to {value.high:.3g})"
