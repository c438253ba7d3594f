"""Turns the rows of many looks into figures with intervals over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scipy import stats  # comes with scikit-learn

from stablekd_fast.diagnose.measures import ratio_of_share
from stablekd_fast.diagnose.settings import DECOMPOSED, END_TO_END
from stablekd_fast.diagnose.training import Measurements

CONFIDENCE = 0.95
SETTLED = 0.05
"""A loss has settled where this part of its whole fall is left."""


@dataclass(frozen=True)
class Interval:
    """A mean over seeds between the ends of its confidence interval, and each seed's own value."""

    mean: float
    low: float
    high: float
    values: tuple[float, ...]

    def __str__(self) -> str:
        return f"{self.mean:.3g} [{self.low:.3g}, {self.high:.3g}]"


def interval(values: Sequence[float]) -> Interval | None:
    """Return Student's t interval of the mean of two or more values; None if a value is not finite.

    Seeds are taken as independent, and their spread as normal.
    """
    if not all(map(math.isfinite, values)):
        return None
    mean = statistics.fmean(values)
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    reach = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - reach, mean + reach, tuple(values))


def ratio_interval(values: Sequence[float]) -> Interval | None:
    """Return the same of the logarithms, around the geometric mean. None if a value is not above zero and finite."""
    if not all(math.isfinite(value) and value > 0 for value in values):
        return None
    logs = interval([math.log(value) for value in values])
    assert logs is not None
    return Interval(math.exp(logs.mean), math.exp(logs.low), math.exp(logs.high), tuple(values))


@dataclass(frozen=True)
class Summary:
    """Figures over seeds. Each seed's value is first averaged over the steps looked at.

    None stands for what could not be measured.
    """

    gap: Interval | None
    """Mean entanglement over blocks: that of end-to-end training less that of decomposed training."""
    others_share: Interval | None
    """The fraction of all change, entanglement + own change, that is entanglement in end-to-end training."""
    snr_gain: Interval | None
    """Signal-to-noise ratio decomposed / end to end: the geometric mean over all blocks but the last."""
    loss_ratio: Interval | None
    """The composed student's whole loss at the last look: decomposed / end to end."""
    blocks: list[dict]
    """Intervals of each block, by measure and arm."""
    cuts: list[dict]
    """For each cut, the `entanglement` that it takes away and the `exposure` at the block behind it."""
    settled: tuple[int | None, ...]
    """For each seed, the step at which the loss of the student composed of decomposed blocks had no more than `SETTLED`
    of its fall left; None where it never fell."""


def summarise(measured: Measurements) -> Summary:
    """Return the figures of what `measure` gave."""
    table = Table(measured.blocks)
    last = range(len(measured.cuts) + 1)[-1]
    entangled, apart = (table.means("entanglement", arm) for arm in (END_TO_END, DECOMPOSED))
    own = table.means("own_change", END_TO_END)
    gains = [table.snr_gains(block) for block in range(last)]
    composed = {arm: table.curves("composed_loss", arm, _shared_ends(measured)) for arm in (END_TO_END, DECOMPOSED)}
    return Summary(
        gap=interval([a - b for a, b in zip(entangled, apart)]),
        others_share=interval([a / (a + b) if a + b else math.nan for a, b in zip(entangled, own)]),
        snr_gain=ratio_interval([_geometric(of_seed) for of_seed in zip(*gains)]),
        loss_ratio=ratio_interval([d[-1][1] / e[-1][1] for d, e in zip(composed[DECOMPOSED], composed[END_TO_END])]),
        blocks=[_block(table, block) for block in range(last + 1)],
        cuts=_cuts(measured, table),
        settled=tuple(_settled(curve) for curve in composed[DECOMPOSED]),
    )


class Table:
    """Answers questions about rows of blocks, by arm and block. Answers are lists over seeds."""

    def __init__(self, rows: list[dict]) -> None:
        self.rows, self.seeds = rows, sorted({row["seed"] for row in rows})

    def means(self, name: str, arm: str, block: int | None = None, average: Callable = statistics.fmean) -> list[float]:
        """Return averages over steps, and over blocks unless one is given; NaN where nothing was measured."""
        found = []
        for seed in self.seeds:
            values = [row[name] for row in self._of(seed, arm, block) if row[name] is not None]
            found.append(average(values) if values else math.nan)
        return found

    def snr(self, arm: str, block: int) -> list[float]:
        """Return signal-to-noise ratios. The signal share is averaged, since it is bounded, and then made a ratio."""
        return [ratio_of_share(share) for share in self.means("signal_share", arm, block)]

    def snr_gains(self, block: int) -> list[float]:
        both = zip(self.snr(DECOMPOSED, block), self.snr(END_TO_END, block))
        return [one / other if one > 0 and other > 0 else math.nan for one, other in both]

    def curves(self, name: str, arm: str, blocks: Sequence[int]) -> list[list[tuple[int, float]]]:
        """Return for each seed the sums over blocks as (step, value)."""
        curves = []
        for seed in self.seeds:
            sums: dict[int, float] = {}
            for row in self._of(seed, arm, None):
                if row["block"] in blocks:
                    sums[row["step"]] = sums.get(row["step"], 0.0) + row[name]
            curves.append(sorted(sums.items()))
        return curves

    def _of(self, seed: int, arm: str, block: int | None) -> list[dict]:
        return [
            row for row in self.rows
            if row["seed"] == seed and row["arm"] == arm and (block is None or row["block"] == block)
        ]  # fmt: skip


def _block(table: Table, block: int) -> dict:
    row: dict = {"block": block, "snr_gain": ratio_interval(table.snr_gains(block))}
    for arm in (END_TO_END, DECOMPOSED):
        row[arm] = {
            "entanglement": interval(table.means("entanglement", arm, block)),
            "own_change": interval(table.means("own_change", arm, block)),
            "snr": interval(table.snr(arm, block)),
            "cosine": interval(table.means("cosine", arm, block)),
            "curvature": interval(table.means("curvature", arm, block, statistics.median)),
            "drift": interval(table.means("drift", arm, block)),
        }
    return row


def _cuts(measured: Measurements, table: Table) -> list[dict]:
    rows = []
    for index, cut in enumerate(measured.cuts):
        taken = [
            statistics.fmean(
                row["entanglement"] for row in measured.between if row["cut"] == index and row["seed"] == seed
            )
            for seed in table.seeds
        ]
        fed, composed = (table.curves(name, DECOMPOSED, [index + 1]) for name in ("loss", "composed_loss"))
        exposure = [c[-1][1] / f[-1][1] if f[-1][1] else math.nan for c, f in zip(composed, fed)]
        rows.append({"cut": cut.name, "entanglement": interval(taken), "exposure": ratio_interval(exposure)})
    return rows


def _shared_ends(measured: Measurements) -> list[int]:
    """Return the blocks at whose end the student has a loss when it trains end to end (decomposed, all have one)."""
    return sorted(
        {row["block"] for row in measured.blocks if row["arm"] == END_TO_END and row["composed_loss"] is not None}
    )


def _settled(curve: list[tuple[int, float]]) -> int | None:
    (_, first), (_, last) = curve[0], curve[-1]
    if last >= first:
        return None
    return next(step for step, loss in curve if loss <= last + SETTLED * (first - last))


def _geometric(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values))) if all(value > 0 for value in values) else math.nan
