"""Choose pairs of cuts: by the names that a user gave, or by spatial size and cost."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
from collections.abc import Sequence

import numpy as np

from stablekd_fast.blocks.trace import CutPoint, TracedNetwork
from stablekd_fast.errors import CutError

PointPair = tuple[CutPoint, CutPoint]

SMALLEST_FRACTION = 0.05
"""A block that costs less than this fraction of its network is joined to the next one (the head stands alone)."""

DEFAULT_BLOCKS = 4
"""How many blocks, head included, a network of one spatial size throughout gets, such as a vision transformer."""


def named_pairs(
    teacher: TracedNetwork, student: TracedNetwork, cuts: Sequence[str | tuple[str, str]]
) -> list[PointPair]:
    """Cut points for given module names: one name for both networks, or `(teacher name, student name)`.

    Raises CutError for unknown names (with the nearest ones), wrong order, or places that cannot be mapped.
    """
    pairs = []
    for cut in cuts:
        teacher_name, student_name = (cut, cut) if isinstance(cut, str) else cut
        pair = _find(teacher, teacher_name, "teacher"), _find(student, student_name, "student")
        if not pair[0].layout.fits(pair[1].layout):
            raise CutError(
                f"Shapes differ at the cut {teacher_name!r} / {student_name!r}: the teacher carries "
                f"{list(pair[0].layout.shape)}, the student {list(pair[1].layout.shape)} per image. Channels may "
                "differ, and the size of a grid with the image's proportions; other spatial sizes must agree. Student "
                f"cuts that would do: {_names_that_fit(student, pair[0])}."
            )
        pairs.append(pair)
    for network, side in ((teacher, 0), (student, 1)):
        order = [network.points.index(pair[side]) for pair in pairs]
        if any(a >= b for a, b in itertools.pairwise(order)):
            raise CutError(
                f"Cuts must be given in the order of execution, each once; in the {('teacher', 'student')[side]} "
                f"{[pair[side].name for pair in pairs]} is not. Reorder them."
            )
    return pairs


def automatic_pairs(teacher: TracedNetwork, student: TracedNetwork, blocks: int | None = None) -> list[PointPair]:
    """Cut where both networks change from one grid to another; where that does not say enough, balance the costs.

    With `blocks` given, the pairs that balance the costs of exactly that many blocks, in each of which the student has
    products to train; pairs of one grid are preferred. Raises CutError if there are not enough places.
    """
    student = dataclasses.replace(student, points=tuple(point for point in student.points if point.divides is None))
    head = _last_ends(teacher, student)
    if blocks is None:
        pairs = _drop_cheap(teacher, student, _stage_ends(teacher, student, head))
        if len(pairs) >= 2:
            return pairs
        for fewer in range(DEFAULT_BLOCKS, 1, -1):
            balanced = _balanced(teacher, student, head, fewer - 1 - len(head))
            if balanced is not None:
                return balanced + head
        raise CutError(_too_few(teacher, student))
    if blocks < 2:
        raise CutError(f"blocks={blocks} was given, but at least 2 are needed to decompose a network.")
    body = _balanced(teacher, student, head, blocks - 1 - len(head))
    if body is None:
        raise CutError(_too_few(teacher, student, blocks))
    return body + head


def _too_few(teacher: TracedNetwork, student: TracedNetwork, blocks: int | None = None) -> str:
    """Say what both networks have, and what stays whole in them; `blocks`: how many were asked for."""
    sides = {"teacher": teacher, "student": student}
    sizes = "; ".join(f"the {role} has {_sizes(network) or 'none'}" for role, network in sides.items())
    reasons = {f"In the {role} {reason}." for role, network in sides.items() for reason in network.whole.values()}
    more = " ".join(sorted(reasons)[:4])
    wanted = f"{blocks} blocks were asked for, but teacher and student" if blocks else "Teacher and student"
    head = _last_ends(teacher, student)
    possible = [n for n in range(2, blocks or 2) if _balanced(teacher, student, head, n - 1 - len(head)) is not None]
    way = f"Ask for {possible[-1]}, or give" if possible else "Give"
    return (
        f"{wanted} have too few cuts in common, of equal spatial size or on grids of the image's proportions: {sizes}. "
        f"{more}{' ' if more else ''}{way} cuts by name or block lists by hand; the methods kd and ce need no cuts."
    )


def _find(network: TracedNetwork, name: str, role: str) -> CutPoint:
    for point in network.points:
        if name in point.aliases:
            return point
    valid = {alias: point.name for point in network.points for alias in point.aliases}
    near = list(dict.fromkeys(valid[alias] for alias in difflib.get_close_matches(name, valid, 5, 0.3)))
    listed = ", ".join(near or list(dict.fromkeys(valid.values()))[:8])
    exists = name in dict(network.root.named_modules())
    reason = "other tensors run beside its output (a branch or a skip)" if exists else f"the {role} has no such module"
    raise CutError(f"Cannot cut the {role} at {name!r}: {reason}. Cuts near that name: {listed}.")


def _names_that_fit(network: TracedNetwork, other: CutPoint) -> str:
    return ", ".join(point.name for point in network.points if point.layout.fits(other.layout)) or "none"


def _size(point: CutPoint) -> tuple[int, ...]:
    """What tells a stage from the next: the grid, or where there is none, the places."""
    return point.layout.grid or point.layout.places


def _sizes(network: TracedNetwork) -> list[tuple[int, ...]]:
    return list(dict.fromkeys(_size(point) for point in network.points if point.layout.extended))


def _stage_ends(teacher: TracedNetwork, student: TracedNetwork, head: list[PointPair]) -> list[PointPair]:
    """Pairs of cuts: for each size that both networks have, the end of its stage in each; and the `head`, where it
    comes after them in both."""
    ends = [_stage_end(teacher), _stage_end(student)]
    pairs = [(ends[0][size], ends[1][size]) for size in ends[1] if size in ends[0]]
    pairs.sort(key=lambda pair: student.points.index(pair[1]))
    chain = _longest_chain([pair for pair in pairs if pair[0].layout.fits(pair[1].layout)], teacher, student)
    return chain + [last for last in head if chain and all(a.flops > b.flops for a, b in zip(last, chain[-1]))]


def _last_ends(teacher: TracedNetwork, student: TracedNetwork) -> list[PointPair]:
    """The pair of both networks' last stages, behind which only the head is left; none if one cannot be mapped to the
    other."""
    last = [max(_stage_end(network).values(), key=network.points.index, default=None) for network in (teacher, student)]
    if last[0] is None or last[1] is None or not last[0].layout.fits(last[1].layout):
        return []
    return [(last[0], last[1])]


def _longest_chain(pairs: list[PointPair], teacher: TracedNetwork, student: TracedNetwork) -> list[PointPair]:
    """The pairs, in the student's order, that follow one another in the teacher too: as many as can be, and of such
    choices the one whose last pair has most of both networks before it."""
    chains: list[tuple[int, float, list[PointPair]]] = []
    for pair in pairs:
        before = [
            chain for chain in chains if teacher.points.index(chain[2][-1][0]) < teacher.points.index(pair[0])
        ]  # fmt: skip
        count, _, longest = max(before, key=lambda chain: chain[:2], default=(0, 0.0, []))
        share = min(pair[0].flops / max(teacher.flops, 1), pair[1].flops / max(student.flops, 1))
        chains.append((count + 1, share, [*longest, pair]))
    return max(chains, key=lambda chain: chain[:2], default=(0, 0.0, []))[2]


def _stage_end(network: TracedNetwork) -> dict[tuple[int, ...], CutPoint]:
    """By size, the end of its stage: the last cut that ends an outermost module.

    Cuts in the first tenth of the stage's cost are left aside, so that a cheap stem is not taken for the stage.
    """
    stages: dict[tuple[int, ...], list[CutPoint]] = {}
    for point in network.points:
        if point.layout.extended:
            stages.setdefault(_size(point), []).append(point)
    ends = {}
    for size, points in stages.items():
        first, last = points[0].flops, points[-1].flops
        late = [point for point in points if point.flops >= first + 0.1 * (last - first)]
        depth = min(point.depth for point in late)
        ends[size] = [point for point in late if point.depth == depth][-1]
    return ends


def _drop_cheap(teacher: TracedNetwork, student: TracedNetwork, pairs: list[PointPair]) -> list[PointPair]:
    """The pairs without those that end a block of less than `SMALLEST_FRACTION`; the last pair stays in any case."""
    kept: list[PointPair] = []
    for pair in pairs:
        before = [kept[-1][side].flops if kept else 0 for side in (0, 1)]
        fraction = min(
            (pair[0].flops - before[0]) / max(teacher.flops, 1), (pair[1].flops - before[1]) / max(student.flops, 1)
        )
        if fraction >= SMALLEST_FRACTION:
            kept.append(pair)
        elif pair is pairs[-1] and kept:
            kept[-1] = pair
    return kept


def _balanced(
    teacher: TracedNetwork, student: TracedNetwork, head: list[PointPair], count: int
) -> list[PointPair] | None:
    """`count` pairs before `head` that give blocks of even cost in the student, and of equal fractions in both.

    The choice is exact, by dynamic programming: the penalty of a pair depends only on how far its cumulative costs are
    from even fractions, on the change of grid and on taste, so a state is (number of cuts placed, last pair). None if
    there are too few pairs.
    """
    if count <= 0:
        return [] if count == 0 else None
    ends = [point.flops for point in head[0]] if head else [teacher.flops, student.flops]
    t = [point for point in teacher.points if point.layout.extended and point.flops < ends[0]]
    s = [point for point in student.points if point.layout.extended and 0 < point.flops < ends[1]]
    if not t or not s:
        return None
    costs = [np.array([point.flops for point in points], dtype=float) for points in (t, s)]
    fractions = costs[0][:, None] / max(ends[0], 1), costs[1][None] / max(ends[1], 1)
    fixed = (fractions[0] - fractions[1]) ** 2 + _taste(t, s) + np.array([[_change(a, b) for b in s] for a in t])
    cheaper = np.searchsorted(costs[1], costs[1])  # how many of the student's points cost less than each
    table: list[np.ndarray] = []
    for k in range(count):
        even = (k + 1) / (count + 1)
        penalty = fixed + (fractions[0] - even) ** 2 + (fractions[1] - even) ** 2
        if table:
            least = np.full((len(t) + 1, len(s) + 1), np.inf)
            least[1:, 1:] = np.minimum.accumulate(np.minimum.accumulate(table[-1], 0), 1)
            penalty = penalty + least[: len(t), cheaper]
        table.append(penalty)
    if not np.isfinite(table[-1]).any():
        return None
    chosen, rows, columns = [], len(t), len(s)
    for penalty in reversed(table):
        before = penalty[:rows, :columns]
        rows, column = (int(i) for i in np.unravel_index(before.argmin(), before.shape))
        chosen.append((t[rows], s[column]))
        columns = int(cheaper[column])
    return chosen[::-1]


def _taste(t: list[CutPoint], s: list[CutPoint]) -> np.ndarray:
    """Among cuts of about equal cost, ends of outer modules are preferred, then the last, which follows the
    activation."""
    terms = [np.array([1e-3 * min(p.depth, 9) - 1e-9 * place for place, p in enumerate(points)]) for points in (t, s)]
    return terms[0][:, None] + terms[1][None]


def _change(one: CutPoint, other: CutPoint) -> float:
    """What a pair costs by the change of its grid: a doubling of its rows as much as about a seventh of the network's
    cost on the wrong side of both cuts; infinite where there is no map."""
    a, b = one.layout, other.layout
    if not a.fits(b):
        return math.inf
    if a.grid is None or b.grid is None or a.grid == b.grid:
        return 0.0
    return 0.02 + 0.02 * abs(math.log2(math.prod(a.grid) / math.prod(b.grid))) / 2
