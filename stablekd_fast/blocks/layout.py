"""How an activation lies: where its channels are, which grid of places it covers, and how many tokens lead it.

A convolutional network carries maps `[C, H, W]` or `[H, W, C]`, a transformer tokens `[T, C]`: class and register
tokens first, then a grid, row by row. Two activations whose grids are known can stand at one cut, whatever their sizes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_MOST_LEADING = 8
"""More tokens before a grid than any published network has."""


@dataclass(frozen=True)
class Layout:
    """The axes of an activation, for one image."""

    shape: tuple[int, ...]
    """Without the batch axis."""
    channel_axis: int
    """The axis of the channels in the batched tensor: 1 for `[N, C, H, W]`, -1 for `[N, H, W, C]` and tokens."""
    grid: tuple[int, int] | None
    """Rows and columns; None where the places are no grid of the image's proportions."""
    leading: int = 0
    """Tokens before the grid."""

    @property
    def places(self) -> tuple[int, ...]:
        """The shape without its channels: `(H, W)`, `(tokens,)` or `()`."""
        return _without_channels(self.shape, self.channel_axis)

    @property
    def channels(self) -> int:
        """The width."""
        return self.shape[self.channel_axis - 1 if self.channel_axis > 0 else self.channel_axis]

    @property
    def extended(self) -> bool:
        """Whether there is more than one place."""
        return math.prod(self.places) > 1

    def fits(self, other: Layout) -> bool:
        """Whether one can be mapped to the other."""
        return self.places == other.places or (self.grid is not None and other.grid is not None)


def layout_of(shape: tuple[int, ...], channel_axis: int, image: tuple[int, ...]) -> Layout:
    """The layout of an activation of a network that sees images of the size `image`, `(H, W)`.

    Tokens are a grid where the image's proportions give one: of 197 tokens of a square image, one leads 14 x 14.
    """
    places = _without_channels(shape, channel_axis)
    if len(image) != 2:
        return Layout(shape, channel_axis, None)
    height, width = image
    if len(places) == 2 and abs(places[0] * width - places[1] * height) <= max(image):
        return Layout(shape, channel_axis, (places[0], places[1]))
    for leading in range(_MOST_LEADING + 1 if len(places) == 1 else 0):
        count = places[0] - leading
        for rows in range(1, count):
            columns = count // rows
            if rows * columns == count and columns in (rows * width // height, -(-rows * width // height)):
                return Layout(shape, channel_axis, (rows, columns), leading)
    return Layout(shape, channel_axis, None)


def _without_channels(shape: tuple[int, ...], channel_axis: int) -> tuple[int, ...]:
    axis = channel_axis - 1 if channel_axis > 0 else len(shape) - 1
    return shape[:axis] + shape[axis + 1 :]


class Resampling(nn.Module):
    """A fixed map between the places of two layouts, `[N, places, C]` to `[N, other places, C]`.

    A grid with fewer rows and columns gets the mean of what each of its places covers (`adaptive_avg_pool2d`), a finer
    one is interpolated (bilinear, corners not aligned). Leading tokens are handed on; those that the other layout lacks
    are dropped, and those that only it has get the mean over the grid, as a pooled network would read it.
    """

    def __init__(self, given: Layout, wanted: Layout) -> None:
        super().__init__()
        assert given.grid is not None and wanted.grid is not None
        self.given, self.wanted = given, wanted
        self.given_grid, self.wanted_grid = given.grid, wanted.grid

    @property
    def shrinks(self) -> bool:
        """Whether the result has fewer places."""
        return math.prod(self.wanted.places) < math.prod(self.given.places)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[N, *places, C]`."""
        leading, grid = x.flatten(1, -2).split([self.given.leading, math.prod(self.given_grid)], 1)
        if self.given_grid != self.wanted_grid:
            grid = self._resampled(grid.unflatten(1, self.given_grid).movedim(-1, 1)).movedim(1, -1).flatten(1, 2)
        missing = self.wanted.leading - self.given.leading
        means = [grid.mean(1, keepdim=True).expand(-1, missing, -1)] if missing > 0 else []
        return torch.cat([leading[:, : self.wanted.leading], *means, grid], 1).unflatten(1, self.wanted.places)

    def _resampled(self, maps: Tensor) -> Tensor:
        """`[N, C, rows, columns]` on the other grid."""
        if all(new <= old for new, old in zip(self.wanted_grid, self.given_grid)):
            return nn.functional.adaptive_avg_pool2d(maps, self.wanted_grid)
        return nn.functional.interpolate(maps, self.wanted_grid, mode="bilinear")

    def extra_repr(self) -> str:
        sizes = ["x".join(map(str, grid)) for grid in (self.given_grid, self.wanted_grid)]
        tokens = [f" after {layout.leading} token(s)" * bool(layout.leading) for layout in (self.given, self.wanted)]
        return f"{sizes[0]}{tokens[0]} -> {sizes[1]}{tokens[1]}"
