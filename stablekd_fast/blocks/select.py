"""Choose pairs of cuts: by the names that a user gave, or by spatial size and cost."""

from __future__ import annotations

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

    Raises CutError for unknown names (with the nearest ones), wrong order, or different spatial sizes.
    """
    pairs = []
    for cut in cuts:
        teacher_name, student_name = (cut, cut) if isinstance(cut, str) else cut
        pair = _find(teacher, teacher_name, "teacher"), _find(student, student_name, "student")
        if pair[0].spatial != pair[1].spatial:
            raise CutError(
                f"Shapes differ at the cut {teacher_name!r} / {student_name!r}: the teacher carries "
                f"{list(pair[0].shape)}, the student {list(pair[1].shape)} per image. Channels may differ, spatial "
                f"sizes must agree; student cuts of that size: {_names_of_size(student, pair[0].spatial)}."
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
    """Cut where both networks change spatial size; where that does not say enough, balance the costs.

    With `blocks` given, the pairs of equal spatial size that balance the costs of exactly that many blocks, in each of
    which the student has products to train. Raises CutError if there are not enough places.
    """
    ends, asked = _stage_ends(teacher, student), blocks is not None
    if blocks is None:
        pairs = _drop_cheap(teacher, student, ends)
        if len(pairs) >= 2:
            return pairs
        blocks = DEFAULT_BLOCKS
    if blocks < 2:
        raise CutError(f"blocks={blocks} was given, but at least 2 are needed to decompose a network.")
    head = ends[-1:]
    body = _balanced(teacher, student, head, blocks - 1 - len(head))
    if body is None:
        raise CutError(_too_few(teacher, student, blocks, asked=asked))
    return body + head


def _too_few(teacher: TracedNetwork, student: TracedNetwork, blocks: int, asked: bool) -> str:
    """Say what both networks have, and what stays whole in them."""
    wanted = f"{blocks} blocks were asked for, but teacher and student" if asked else "Teacher and student"
    sides = {"teacher": teacher, "student": student}
    sizes = "; ".join(f"the {role} has {_sizes(network) or 'none'}" for role, network in sides.items())
    reasons = {f"In the {role} {reason}." for role, network in sides.items() for reason in network.whole.values()}
    more = " ".join(sorted(reasons)[:4])
    return (
        f"{wanted} have too few cuts of equal spatial size in common: {sizes}. {more}{' ' if more else ''}"
        f"{'Ask for fewer blocks, or give' if asked else 'Give'} cuts by name or block lists by hand; the methods kd "
        "and ce need no cuts."
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


def _names_of_size(network: TracedNetwork, spatial: tuple[int, ...]) -> str:
    return ", ".join(point.name for point in network.points if point.spatial == spatial) or "none"


def _sizes(network: TracedNetwork) -> list[tuple[int, ...]]:
    return list(dict.fromkeys(point.spatial for point in network.points if _extended(point)))


def _extended(point: CutPoint) -> bool:
    return math.prod(point.spatial) > 1


def _stage_ends(teacher: TracedNetwork, student: TracedNetwork) -> list[PointPair]:
    """Pairs of cuts: for each spatial size that both networks have, the end of its stage in each."""
    ends = [_stage_end(teacher), _stage_end(student)]
    pairs = sorted(
        ((ends[0][spatial], ends[1][spatial]) for spatial in ends[1] if spatial in ends[0]),
        key=lambda pair: student.points.index(pair[1]),
    )
    return _longest_chain(pairs, teacher, student)


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
    """By spatial size, the end of its stage: the last cut that ends an outermost module.

    Cuts in the first tenth of the stage's cost are left aside, so that a cheap stem is not taken for the stage.
    """
    stages: dict[tuple[int, ...], list[CutPoint]] = {}
    for point in network.points:
        if _extended(point):
            stages.setdefault(point.spatial, []).append(point)
    ends = {}
    for spatial, points in stages.items():
        first, last = points[0].flops, points[-1].flops
        late = [point for point in points if point.flops >= first + 0.1 * (last - first)]
        depth = min(point.depth for point in late)
        ends[spatial] = [point for point in late if point.depth == depth][-1]
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
    from even fractions, so a state is (number of cuts placed, last pair). None if there are too few pairs.
    """
    if count == 0:
        return []
    ends = [point.flops for point in head[0]] if head else [teacher.flops, student.flops]
    pairs = [
        (t, s)
        for t in teacher.points
        for s in student.points
        if t.spatial == s.spatial and _extended(t) and t.flops < ends[0] and 0 < s.flops < ends[1]
    ]
    if len(pairs) < count:
        return None
    fractions = np.array([(t.flops / max(ends[0], 1), s.flops / max(ends[1], 1)) for t, s in pairs])
    order_t = np.array([teacher.points.index(t) for t, _ in pairs])
    order_s = np.array([student.points.index(s) for _, s in pairs])
    costs_s = np.array([s.flops for _, s in pairs])
    follows = (order_t[None] > order_t[:, None]) & (costs_s[None] > costs_s[:, None])  # [previous, next]
    # Among cuts of about equal cost, ends of outer modules are preferred, then the last, which follows the activation.
    depth = np.array([min(t.depth, 9) + min(s.depth, 9) for t, s in pairs])
    taste = 1e-3 * depth - 1e-9 * (order_t + order_s)

    def penalty(k: int) -> np.ndarray:
        even = (k + 1) / (count + 1)
        return ((fractions - even) ** 2).sum(1) + ((fractions[:, 0] - fractions[:, 1]) ** 2) + taste

    best, came_from = penalty(0), []
    for k in range(1, count):
        through = np.where(follows, best[:, None], np.inf)
        came_from.append(through.argmin(0))
        best = through.min(0) + penalty(k)
    last = int(best.argmin())
    if not np.isfinite(best[last]):
        return None
    chosen = [last]
    for step in reversed(came_from):
        chosen.append(int(step[chosen[-1]]))
    return [pairs[i] for i in reversed(chosen)]
