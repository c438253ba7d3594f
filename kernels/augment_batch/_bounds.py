"""The check of row numbers and offsets that every implementation makes before it reads."""

from __future__ import annotations

from torch import Tensor

from stablekd_fast.kernels._checks import OperandError


def check_bounds(images: Tensor, rows: Tensor, offsets: Tensor, padding: int) -> None:
    """Raise OperandError unless all rows exist and all crops lie in the padded image. This waits for the device."""
    _check("rows", rows, len(images) - 1, f"there are {len(images)} images")
    _check("offsets", offsets, 2 * padding, f"crops of the full size out of images padded by {padding}")


def _check(name: str, values: Tensor, last: int, why: str) -> None:
    if values.numel() == 0:
        return
    low, high = (int(bound) for bound in values.aminmax())
    if low < 0 or high > last:
        raise OperandError(f"{name} has values in {low}..{high}; they must lie in 0..{last} ({why}).")
