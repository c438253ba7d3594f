"""Colours of the report: pairs for light and dark pages, which colour-blind readers can tell apart."""

from __future__ import annotations

import itertools

METHODS = (
    # (on light, on dark): Okabe and Ito's hues ("Color Universal Design", 2008), set darker or lighter for contrast.
    ("#0067a8", "#56b4e9"),
    ("#c84e00", "#ff8c42"),
    ("#00805c", "#2fd0a0"),
    ("#a8407f", "#e79ac7"),
    ("#7a6300", "#e6cf3a"),
    ("#444444", "#bdbdbd"),
)

BENCH = (METHODS[0], ("#9aa1a8", "#727a83"), ("#636b73", "#a3abb3"), METHODS[1])
"""Contenders of a bench: ours, rivals, the baseline, and the mark of the limit."""

KNOWN = ("stablekd", "kd", "kd+features", "blocks", "ce")
"""Methods with a colour of their own, in the order of METHODS."""

BLOCK_RAMP = (("#35307f", "#20708e", "#1f8f63", "#9a8a00"), ("#9d97f0", "#4fb8d8", "#52d69a", "#f0e04a"))
"""Knots of the ramp for blocks, which have an order: on light, on dark."""


def method_colours(methods: list[str]) -> list[tuple[str, str]]:
    """A pair (on light, on dark) for each method: its own in every report if it is known, else one that is free."""
    taken = {KNOWN.index(method) for method in methods if method in KNOWN}
    free = itertools.cycle(pair for i, pair in enumerate(METHODS) if i not in taken)
    return [METHODS[KNOWN.index(method)] if method in KNOWN else next(free) for method in methods]


def block_colours(count: int) -> list[tuple[str, str]]:
    """A pair (on light, on dark) for each block, along a ramp from first to last."""
    light, dark = BLOCK_RAMP
    places = [i / max(count - 1, 1) for i in range(count)]
    return [(_along(light, place), _along(dark, place)) for place in places]


def _along(ramp: tuple[str, ...], position: float) -> str:
    """The colour at `position` (0 to 1), linear between the ramp's knots."""
    place = position * (len(ramp) - 1)
    low = min(int(place), len(ramp) - 2)
    fraction = place - low
    channels = zip(_channels(ramp[low]), _channels(ramp[low + 1]))
    return "#" + "".join(f"{round(a + (b - a) * fraction):02x}" for a, b in channels)


def _channels(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
