"""Measures of gradients. A gradient is a list of tensors, one per parameter; sums are taken in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor


def dot(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Return the inner product over all parameters."""
    return sum((a.double() * b.double()).sum().item() for a, b in zip(one, other))


def norm(tensors: Sequence[Tensor]) -> float:
    """Return the length of all parameters taken as one vector."""
    return math.sqrt(dot(tensors, tensors))


def difference(one: Sequence[Tensor], other: Sequence[Tensor]) -> list[Tensor]:
    """Return `one - other`, parameter by parameter."""
    return [a.double() - b.double() for a, b in zip(one, other)]


def relative_change(
    after: Sequence[Tensor], before: Sequence[Tensor], reference: Sequence[Tensor] | None = None
) -> float:
    """Return `|after - before| / |reference|`; `before` is the reference by default. NaN where that is zero."""
    return _ratio(norm(difference(after, before)), norm(before if reference is None else reference))


def cosine(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Return the cosine of the angle between two gradients; NaN where one of them is zero."""
    return _ratio(dot(one, other), norm(one) * norm(other))


def curvature(move: Sequence[Tensor], before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Return the second derivative of the loss along a move d of the weights, `d (g(w + d) - g(w)) / |d|^2`.

    By the mean value theorem it is the mean of d'Hd / |d|^2 on the way from w to w + d, and on a quadratic loss
    d'Hd / |d|^2 itself. NaN where nothing moved.
    """
    return _ratio(dot(move, difference(after, before)), dot(move, move))


class GradientNoise:
    """Estimates signal and noise of a gradient from its values on independent batches, taken one by one.

    With g_1 ... g_m independent, of mean G and covariance C, and their average a:

    - `noise`, sum |g_i - a|^2 / (m - 1), is an unbiased estimate of tr C;
    - `signal`, |a|^2 - noise / m, is one of |G|^2: |a|^2 alone is too large by tr C / m. It equals the mean of g_i g_j
      over all pairs, and where noise prevails it can come out negative.

    (tr C / |G|^2 is the "simple noise scale" of McCandlish et al., arXiv 1812.06162, in batches.)
    """

    def __init__(self) -> None:
        self._count, self._squares = 0, 0.0
        self._sum: list[Tensor] = []

    def add(self, gradient: Sequence[Tensor]) -> None:
        self._count += 1
        self._squares += dot(gradient, gradient)
        self._sum = [g.double() + s for g, s in zip(gradient, self._sum or [0.0] * len(gradient))]

    @property
    def noise(self) -> float:
        self._need_two()
        return (self._squares - dot(self._sum, self._sum) / self._count) / (self._count - 1)

    @property
    def signal(self) -> float:
        return dot(self._sum, self._sum) / self._count**2 - self.noise / self._count

    @property
    def signal_share(self) -> float:
        """`signal / (signal + noise)`, where the sum is the mean of |g_i|^2: between -1 / (m - 1) and 1.

        Unlike the ratio signal / noise it is bounded, and can be averaged over a training.
        """
        return _ratio(self.signal, self._squares / self._count)

    def _need_two(self) -> None:
        if self._count < 2:
            raise ValueError(f"Noise is estimated from at least two gradients; {self._count} was given.")


def ratio_of_share(share: float) -> float:
    """Return the signal-to-noise ratio that belongs to a signal share."""
    return _ratio(share, 1.0 - share)


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan
