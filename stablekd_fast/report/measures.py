"""What runs are compared by: the accuracy, or where students have no classifier the cosine with the teacher."""

from __future__ import annotations

from collections.abc import Sequence

from stablekd_fast.errors import StableKDError

MEASURES = {"accuracy": (0.0, 1.0), "cosine": (-1.0, 1.0)}
"""What runs are compared by, with the range of its values: the accuracy, or where students have no classifier the mean
cosine of their embedding with the teacher's."""


def measure_of(runs: Sequence[dict]) -> str:
    """The one of `MEASURES` that these runs, or evaluations, have; accuracy where there are none.

    Raises StableKDError where some have another than others.
    """
    found = {next((name for name in MEASURES if name in run), "accuracy") for run in runs}
    if len(found) > 1:
        raise StableKDError(
            "Some runs say their accuracy and others a cosine, which cannot be compared; report them apart."
        )
    return next(iter(found), "accuracy")


def shown(measure: str, value: float | None) -> str:
    """A value as people read it: an accuracy in percent, a cosine as it is."""
    if value is None:
        return "not finite"
    return f"{value:.2%}" if measure == "accuracy" else f"{value:.4f}"
