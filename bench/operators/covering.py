"""Chooses a few of many combinations, such that every pair of values that occurs still occurs together."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Hashable, Iterable
from itertools import combinations, product
from typing import TypeVar

Job = TypeVar("Job", bound=Hashable)

_CANDIDATES = 60


def covering_sample(
    jobs: Iterable[Job],
    pairs: Callable[[Job], Collection[Hashable]],
    draw: random.Random | None = None,
    price: Callable[[Job], float] = lambda job: 1.0,
) -> list[Job]:
    """Choose a few of `jobs` with all the `pairs` of all of them. The choice is the same on every run.

    It is greedy: of some random jobs the one with most new pairs for its price comes next.
    """
    draw, chosen, bits = draw or random.Random(0), [], {}

    def as_bits(job: Job) -> int:
        """One bit per pair: what is left of each job is found anew after every choice."""
        found = 0
        for pair in pairs(job):
            found |= 1 << bits.setdefault(pair, len(bits))
        return found

    left = [(job, as_bits(job)) for job in dict.fromkeys(jobs)]
    while left:
        candidates = draw.sample(left, min(_CANDIDATES, len(left)))
        job, new = max(candidates, key=lambda one: one[1].bit_count() / price(one[0]))
        chosen.append(job)
        left = [(other, rest) for other, own in left if (rest := own & ~new)]
    return chosen


def covering_levels(
    *factors: Collection[Hashable], among: int = 2000, price: Callable[[tuple], float] = lambda levels: 1.0
) -> list[tuple]:
    """Choose a few combinations of the factors' levels, with every pair of levels of two factors in one of them.

    Chosen from `among` random combinations where there are more.
    """
    everything = list(product(*factors))
    if len(everything) > among:
        everything = random.Random(0).sample(everything, among)
    return covering_sample(everything, level_pairs, price=price)


def level_pairs(levels: tuple) -> set:
    """Return the pairs of levels in one combination."""
    return set(combinations(enumerate(levels), 2))
