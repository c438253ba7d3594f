"""Which teacher outputs to keep, where and how exactly, so that a run takes least time: a cost model and its minimum.

A batch takes as long as the busiest of four resources, since they work side by side: the device that computes, the feed
that makes the next batch ready, the disk, and the loader of images. In a stage a batch costs the device the students'
steps, the teacher blocks that must run, encoding or decoding of rows, and images where it makes them. The feed does all
of that but the students' steps, and copies over the link, one after the other. Of these two the batch takes
`max(students' steps, link) + the rest of the device`: beside the step copies are free, and work on the device is not.
On a CPU nothing is copied over a link, and the device is the busier one.

An output that is not kept is computed in one pass (relay), which goes on from the nearest kept output before it where
that one is exact and unbridged (recompute). In the first epochs of a run, until each view was seen once, rows that are
not stored yet are computed and written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np

from stablekd_fast.cache.columns import Kept, Plan
from stablekd_fast.cache.speed import CodecCost, TierCost

RESOURCES = ("device", "feed", "disk", "loader")
_MOST_LABELS, _FEW_LABELS = 1000, 10


@dataclass(frozen=True)
class OutputCost:
    """One of the teacher's outputs. `block`: seconds per batch of the teacher block that ends in it."""

    name: str
    block: float
    codecs: Mapping[str, CodecCost]
    bridged: bool = False


@dataclass(frozen=True)
class StageCost:
    """`student`: seconds per batch of all groups' steps. `wanted`: outputs that they read. `fill`: how many of the
    `batches` come before every view was seen."""

    student: float
    wanted: frozenset[int]
    batches: int
    fill: int


@dataclass(frozen=True)
class Costs:
    """All that the decision depends on. `images`: what making images costs a batch, in seconds on the device, the link
    and in the loader."""

    outputs: tuple[OutputCost, ...]
    stages: tuple[StageCost, ...]
    tiers: Mapping[str, TierCost]
    images: Mapping[str, float]
    rows: int
    """Rows of each output that the run will use: images times views."""
    batch_size: int

    def options(self, output: int) -> Iterator[Kept]:
        """Ways to keep an output that fit the budgets by themselves."""
        for tier, codec in product(self.tiers, self.outputs[output].codecs):
            if self.rows * self.outputs[output].codecs[codec].row_bytes <= self.tiers[tier].budget:
                yield Kept(tier, codec)

    def bytes_of(self, output: int, kept: Kept) -> int:
        return self.rows * self.outputs[output].codecs[kept.codec].row_bytes


class Prediction(NamedTuple):
    """`seconds` of the whole run. Per stage: seconds per batch while filling and after it, by resource."""

    seconds: float
    filling: list[dict[str, float]]
    filled: list[dict[str, float]]

    def images_per_second(self, costs: Costs) -> list[float]:
        """Per stage, once all rows are stored."""
        return [costs.batch_size / max(loads.values()) for loads in self.filled]


class _Walk:
    """The teacher's way through its blocks for one kind of stage and one phase: what each output adds to the loads."""

    def __init__(self, costs: Costs, wanted: frozenset[int], filling: bool) -> None:
        self.costs, self.wanted, self.filling = costs, wanted, filling

    def step(self, at: int, output: int, kept: Kept | None) -> tuple[int, np.ndarray]:
        """From the block after `at` the teacher can go on; returns where it can after `output`, and the loads added."""
        loads = np.zeros(len(RESOURCES))
        if output not in self.wanted:
            return at, loads
        source = self.costs.outputs[output]
        computed = sum(one.block for one in self.costs.outputs[at + 1 : output + 1])
        if kept is None:
            return output, _made_ready({"device": computed})
        codec, tier = source.codecs[kept.codec], self.costs.tiers[kept.tier]
        size = codec.row_bytes * self.costs.batch_size
        live = (1.0 - codec.stored if kept.tier == "disk" else 1.0) if self.filling else 0.0
        if live < 1.0:
            loads += (1 - live) * (_made_ready({"device": codec.decode}) + size * _made_ready(tier.read))
        if live > 0.0:
            loads += live * _made_ready({"device": computed + codec.encode + codec.decode})
            loads += live * size * _made_ready(tier.write)
        goes_on = live > 0.0 or (codec.exact and not source.bridged)
        return (output if goes_on else at), loads


def predict(costs: Costs, plan: Plan) -> Prediction:
    """Seconds that a run takes by the cost model."""
    filling, filled, total = [], [], 0.0
    for stage in costs.stages:
        phases = []
        for is_filling in (True, False):
            walk, at = _Walk(costs, stage.wanted, is_filling), -1
            loads = _constant(costs, stage)
            for output in range(len(costs.outputs)):
                at, more = walk.step(at, output, plan.kept.get(output))
                loads = loads + more
            phases.append(loads)
        total += stage.fill * phases[0].max() + (stage.batches - stage.fill) * phases[1].max()
        filling.append(dict(zip(RESOURCES, phases[0].tolist())))
        filled.append(dict(zip(RESOURCES, phases[1].tolist())))
    return Prediction(float(total), filling, filled)


def fits(costs: Costs, plan: Plan) -> bool:
    """Whether the plan stays within every budget."""
    used = {tier: 0 for tier in costs.tiers}
    for output, kept in plan.kept.items():
        used[kept.tier] += costs.bytes_of(output, kept)
    return all(used[tier] <= costs.tiers[tier].budget for tier in used)


class _Labels(NamedTuple):
    """Partial plans: loads `[labels, kinds of stage, phases, resources]`, bytes `[labels, tiers]`, and for each output
    decided so far which of its options was chosen `[labels, outputs]`."""

    loads: np.ndarray
    used: np.ndarray
    chosen: np.ndarray

    def take(self, which: np.ndarray | np.bool_ | slice) -> _Labels:
        """Return some of the labels, by number or by a mask."""
        return _Labels(self.loads[which], self.used[which], self.chosen[which])


def best_plan(costs: Costs) -> Plan:
    """The plan of least predicted time within the budgets.

    Outputs are decided in order. Of two partial plans from whose ends the teacher goes on alike, one that is nowhere
    better than the other is dropped, and so is one that could not become better than a plan known already. The minimum
    is exact unless more than 1000 partial plans stay side by side; then the most promising are followed.
    """
    search = _PlanSearch(costs)
    quick = search.run(_FEW_LABELS, math.inf)
    best = search.run(_MOST_LABELS, search.seconds(quick).min())
    return search.plan(best if len(best.used) else quick)


class _PlanSearch:
    """Grows partial plans output by output, and drops those that cannot become the best."""

    def __init__(self, costs: Costs) -> None:
        self.costs, self.tiers = costs, list(costs.tiers)
        self.kinds = sorted({stage.wanted for stage in costs.stages}, key=sorted)
        self.walks = [[_Walk(costs, wanted, filling) for filling in (True, False)] for wanted in self.kinds]
        used = set().union(*self.kinds)
        self.options = [
            [None, *(costs.options(output) if output in used else ())] for output in range(len(costs.outputs))
        ]
        self.budgets = np.array([costs.tiers[tier].budget for tier in self.tiers])
        self.least = self._least_loads()

    def run(self, most: int, known: float) -> _Labels:
        """Labels of whole plans; those that cannot take at most `known` seconds are left out."""
        shape = (len(self.kinds), 2, len(RESOURCES))
        start = _Labels(np.zeros((1, *shape)), np.zeros((1, len(self.tiers))), np.zeros((1, 0), dtype=int))
        states = {tuple((-1, -1) for _ in self.kinds): start}
        for output in range(len(self.costs.outputs)):
            reached: dict[tuple, list[_Labels]] = {}
            for ends, labels in states.items():
                for number in range(len(self.options[output])):
                    there, added, more = self._move(ends, output, number)
                    chosen = np.pad(labels.chosen, ((0, 0), (0, 1)), constant_values=number)
                    grown = _Labels(labels.loads + added, labels.used + more, chosen)
                    reached.setdefault(there, []).append(grown.take((grown.used <= self.budgets).all(1)))
            merged = {there: _Labels(*map(np.concatenate, zip(*parts))) for there, parts in reached.items()}
            pruned = {there: self._pruned(labels, output, most, known) for there, labels in merged.items()}
            states = {there: labels for there, labels in pruned.items() if len(labels.used)}
            if not states:
                return start.take(slice(0))
        return _Labels(*map(np.concatenate, zip(*states.values())))

    def seconds(self, labels: _Labels, more: np.ndarray | float = 0.0) -> np.ndarray:
        """Return for each label the seconds of the whole run, if `more` is added to its loads."""
        total, loads = 0.0, labels.loads + more
        for stage in self.costs.stages:
            busiest = (loads[:, self.kinds.index(stage.wanted)] + _constant(self.costs, stage)).max(-1)
            total = total + stage.fill * busiest[:, 0] + (stage.batches - stage.fill) * busiest[:, 1]
        return np.broadcast_to(total, len(loads))

    def plan(self, labels: _Labels) -> Plan:
        best = labels.chosen[self.seconds(labels).argmin()]
        kept = {output: self.options[output][number] for output, number in enumerate(best)}
        return Plan({output: option for output, option in kept.items() if option is not None})

    def _move(self, ends: tuple, output: int, number: int) -> tuple[tuple, np.ndarray, np.ndarray]:
        """Where the teacher can go on after an output, and the loads and bytes that an option for it adds."""
        option = self.options[output][number]
        moves = [[walk.step(at, output, option) for walk, at in zip(*pair)] for pair in zip(self.walks, ends)]
        more = np.zeros(len(self.tiers))
        if option is not None:
            more[self.tiers.index(option.tier)] = self.costs.bytes_of(output, option)
        there = tuple(tuple(at for at, _ in pair) for pair in moves)
        return there, np.array([[loads for _, loads in pair] for pair in moves]), more

    def _least_loads(self) -> list[np.ndarray]:
        """For each output the least that it and those behind it add, whatever was decided before."""
        least = [np.zeros((len(self.kinds), 2, len(RESOURCES)))]
        for output in reversed(range(len(self.costs.outputs))):
            nearest = tuple((output - 1, output - 1) for _ in self.kinds)
            added = [self._move(nearest, output, number)[1] for number in range(len(self.options[output]))]
            least.append(least[-1] + np.min(added, axis=0))
        return least[::-1]

    def _pruned(self, labels: _Labels, output: int, most: int, known: float) -> _Labels:
        bounds = self.seconds(labels, self.least[output + 1])
        order = np.argsort(bounds, kind="stable")
        order = order[: np.searchsorted(bounds[order], known * (1 + 1e-9), side="right")]
        return _undominated(labels.take(order)).take(slice(most))


def _undominated(labels: _Labels) -> _Labels:
    """Labels come by rising bound; of two that are alike the first stays."""
    if len(labels.used) < 2:
        return labels
    values = np.concatenate([labels.loads.reshape(len(labels.loads), -1), labels.used], axis=1)
    order = np.argsort(values.sum(1), kind="stable")
    keep: list[int] = []
    for i in order[: 2 * _MOST_LABELS]:
        if not keep or not (values[keep] <= values[i]).all(axis=1).any():
            keep.append(i)
    return labels.take(np.array(sorted(keep)))


def _constant(costs: Costs, stage: StageCost) -> np.ndarray:
    """Loads of a batch that no plan changes."""
    loads = _made_ready(costs.images)
    loads[RESOURCES.index("device")] += stage.student
    return loads


def _made_ready(costs: Mapping[str, float]) -> np.ndarray:
    """Return by `RESOURCES` what a part of the next batch costs that takes so long on device, link, disk and in the
    loader."""
    device, link = (costs.get(name, 0.0) for name in ("device", "link"))
    return np.array([device, device + link, costs.get("disk", 0.0), costs.get("loader", 0.0)])


def decisions(costs: Costs, plan: Plan) -> list[dict]:
    """One row per output that is used: what is done with it, and the arithmetic behind it, in plain values.

    `live_ms` is what the teacher block costs per batch, `kept_ms` what reading and decoding the row costs on the
    busiest resource; `gigabytes` what all rows of the run take.
    """
    used, rows, at = frozenset().union(*(stage.wanted for stage in costs.stages)), [], -1
    walk = _Walk(costs, used, filling=False)
    for output, source in enumerate(costs.outputs):
        if output not in used:
            continue
        kept = plan.kept.get(output)
        shown = (
            kept or next(iter(costs.options(output)), None) or Kept(next(iter(costs.tiers)), next(iter(source.codecs)))
        )
        codec = source.codecs[shown.codec]
        read = codec.row_bytes * costs.batch_size * _made_ready(costs.tiers[shown.tier].read)
        read += _made_ready({"device": codec.decode})
        rows.append(
            {
                "output": source.name,
                "decision": f"keep ({kept.tier}, {kept.codec})" if kept else _live(costs, plan, at),
                "live_ms": 1e3 * sum(one.block for one in costs.outputs[at + 1 : output + 1]),
                "kept_ms": 1e3 * float(read.max()),
                "row_bytes": codec.row_bytes,
                "gigabytes": costs.rows * codec.row_bytes / 1e9,
            }
        )
        at, _ = walk.step(at, output, kept)
    return rows


def _live(costs: Costs, plan: Plan, at: int) -> str:
    return f"recompute from {costs.outputs[at].name}" if at in plan.kept else "relay"
