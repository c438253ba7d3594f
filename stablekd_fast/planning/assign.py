"""Which rank trains which groups of a stage, on which part of the batch: the mesh and the assignment of least time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from stablekd_fast.distributed.layout import Layout
from stablekd_fast.errors import ConfigError

_EXACT_GROUPS = 16
"""Up to so many groups the best assignment is searched for; beyond it is approximated."""


_WORTH_IT = 1.1
"""With the teacher's outputs from a cache, images are divided where that is so many times faster than to divide groups
alone: a smaller gain is not worth other numbers and exchanges of gradients, in each of which ranks wait for the
slowest."""


@dataclass(frozen=True)
class GroupCost:
    """Seconds of a group's step, and of the teacher blocks beside it, as functions of the number of images."""

    student: Callable[[float], float]
    teacher: Callable[[float], float]
    gradient_bytes: int
    feeds: Mapping[int, float] = field(default_factory=dict)
    """Seconds per image for each of the teacher's outputs that is read for it. A rank reads one once for all of its
    groups."""


@dataclass(frozen=True)
class ReduceCost:
    """What an all-reduce costs: seconds for nothing, and per byte that a rank sends."""

    latency: float = 0.0
    per_byte: float = 0.0

    @staticmethod
    def sent(size: int, ranks: int) -> float:
        """Bytes that a rank sends, as a ring does it: twice its data, less the part that it ends with."""
        return size * 2 * (ranks - 1) / ranks

    def seconds(self, size: int, ranks: int) -> float:
        return 0.0 if ranks == 1 else self.latency + self.per_byte * self.sent(size, ranks)


def linear(small: tuple[float, float], large: tuple[float, float]) -> Callable[[float], float]:
    """Seconds as a linear function of the number of images through two measured points `(images, seconds)`."""
    slope = max((large[1] - small[1]) / (large[0] - small[0]), 0.0) if large[0] > small[0] else large[1] / large[0]
    fixed = max(large[1] - slope * large[0], 0.0)
    return lambda images: fixed + slope * images


def best_layout(
    groups: Sequence[GroupCost],
    ranks: int,
    batch: int,
    reduce: ReduceCost,
    *,
    live: bool = False,
    axis: str = "auto",
    accumulate: int = 1,
    image_seconds: float = 0.0,
) -> Layout:
    """The mesh on which a step of the stage takes least time. One that divides groups alone, without a teacher that is
    passed on, may take up to 10% more: nothing is exchanged in its steps.

    Args:
        live: whether the live teacher runs; each place runs the teacher's blocks beside its own groups and passes its
            activation on, so that neighbours must lie together.
        image_seconds: that a rank's loader takes for an image, while the rank trains.
        axis: `blocks` for as many places for groups as there can be, `data` for one, `auto` for what takes least time.

    Raises ConfigError if batches of `batch` images cannot be divided.
    """
    meshes = [(b, ranks // b) for b in range(1, min(ranks, len(groups)) + 1) if ranks % b == 0]
    meshes = [(b, d) for b, d in meshes if batch % (d * accumulate) == 0]
    if axis != "auto":
        meshes = sorted(meshes)[-1:] if axis == "blocks" else [mesh for mesh in meshes if mesh[0] == 1]
    if not meshes:
        raise ConfigError(
            f"Batches of {batch} images in {accumulate} part(s) cannot be divided among {ranks} ranks that train "
            f"{len(groups)} group(s); choose a --batch-size that is a multiple of {ranks * accumulate}."
        )
    layouts = [_on_mesh(groups, b, d, batch, reduce, live) for b, d in meshes]

    def weighed(layout: Layout) -> float:
        busiest = max(*layout.seconds, batch / layout.data * image_seconds)
        return busiest / _WORTH_IT if layout.data == 1 and not live else busiest

    return min(layouts, key=weighed)


def _on_mesh(groups: Sequence[GroupCost], blocks: int, data: int, batch: int, reduce: ReduceCost, live: bool) -> Layout:
    images = batch / data
    own = [
        group.student(images) + (group.teacher(images) if live else 0.0) + reduce.seconds(group.gradient_bytes, data)
        for group in groups
    ]
    feeds = [{} if live else {output: cost * images for output, cost in group.feeds.items()} for group in groups]
    places = assign(own, blocks, feeds, neighbours=live)
    return Layout(blocks, data, tuple(places), tuple(loads_of(own, feeds, places, blocks)), live and blocks > 1)


def assign(
    costs: Sequence[float], places: int, feeds: Sequence[Mapping[int, float]] | None = None, *, neighbours: bool = False
) -> list[int]:
    """For each group the place that trains it, so that the busiest place has least to do, and none has nothing.

    `feeds`: for each group what it costs to read what it is fed with; a place pays once for what several of its groups
    read. With `neighbours` each place gets a run of groups in order, without feeds; that minimum is exact. Otherwise it
    is exact for up to 16 groups; beyond, the longest groups are given out first, each to the place that has least
    (Graham 1969: at most 4/3 of the minimum, feeds apart).
    """
    if not 1 <= places <= len(costs):
        raise ValueError(f"{len(costs)} groups cannot fill {places} places.")
    if neighbours:
        return _runs(costs, places)
    feeds = feeds or [{}] * len(costs)
    return (
        _AssignmentSearch(costs, feeds, places).best()
        if len(costs) <= _EXACT_GROUPS
        else _longest_first(costs, feeds, places)
    )


def loads_of(
    costs: Sequence[float], feeds: Sequence[Mapping[int, float]], chosen: Sequence[int], places: int
) -> list[float]:
    """What each place has to do, as `assign` counts it."""
    loads = []
    for place in range(places):
        own = [group for group, at in enumerate(chosen) if at == place]
        fed = {output: cost for group in own for output, cost in feeds[group].items()}
        loads.append(sum(costs[group] for group in own) + sum(fed.values()))
    return loads


def _runs(costs: Sequence[float], places: int) -> list[int]:
    """Cut the list of groups by dynamic programming: the best cuts of the first `n` groups into `p` runs."""
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    best = {(0, 0): (0.0, [])}
    for p in range(1, places + 1):
        for n in range(p, len(costs) + 1):
            options = [(max(best[p - 1, m][0], sums[n] - sums[m]), m) for m in range(p - 1, n) if (p - 1, m) in best]
            load, m = min(options)
            best[p, n] = (load, [*best[p - 1, m][1], n - m])
    return [place for place, length in enumerate(best[places, len(costs)][1]) for _ in range(length)]


def _longest_first(costs: Sequence[float], feeds: Sequence[Mapping[int, float]], places: int) -> list[int]:
    whole = [cost + sum(fed.values()) for cost, fed in zip(costs, feeds)]
    loads, chosen = [0.0] * places, [0] * len(costs)
    left = sorted(range(len(costs)), key=lambda group: -whole[group])
    for number, group in enumerate(left):
        place = number if number < places else loads.index(min(loads))
        chosen[group] = place
        loads[place] += whole[group]
    return chosen


class _AssignmentSearch:
    """Branch and bound: longest groups first, equal places once, branches dropped that cannot beat the best known."""

    def __init__(self, costs: Sequence[float], feeds: Sequence[Mapping[int, float]], places: int) -> None:
        self.costs, self.feeds, self.places = costs, feeds, places
        self.order = sorted(range(len(costs)), key=lambda group: -costs[group])
        once = sum({output: cost for fed in feeds for output, cost in fed.items()}.values())
        self.floor = max(max(costs), (sum(costs) + once) / places)
        self.chosen = _longest_first(costs, feeds, places)
        self.known = max(loads_of(costs, feeds, self.chosen, places))

    def best(self) -> list[int]:
        self._extend(0, [0.0] * self.places, [frozenset()] * self.places, [0] * len(self.costs))
        return self.chosen

    def _extend(self, depth: int, loads: list[float], held: list[frozenset[int]], chosen: list[int]) -> None:
        if self.known <= self.floor * (1 + 1e-12):
            return
        if depth == len(self.order):
            self.known, self.chosen = max(loads), list(chosen)
            return
        group, tried = self.order[depth], set()
        empty = loads.count(0.0)
        for place in range(self.places):
            before = loads[place], held[place]
            fresh = sum(cost for output, cost in self.feeds[group].items() if output not in held[place])
            load = loads[place] + self.costs[group] + fresh
            if load >= self.known or before in tried or (loads[place] and len(self.order) - depth <= empty):
                continue  # the last groups are needed for places that have none
            tried.add(before)
            loads[place], held[place], chosen[group] = load, held[place].union(self.feeds[group]), place
            self._extend(depth + 1, loads, held, chosen)
            loads[place], held[place] = before
