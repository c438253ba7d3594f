"""What the CPU implementations of the losses on logits share."""

from __future__ import annotations

from torch import Tensor

from stablekd_fast.kernels._checks import OperandError


def as_rows(matrix: Tensor) -> Tensor:
    """`matrix` `[N, C]` itself where the elements of a row lie side by side, otherwise a contiguous copy."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def refuse_row(row: int, classes: int, labels: Tensor | None, indices: Tensor | None = None) -> None:
    """Raise OperandError for the label or teacher index of `row` that is no class."""
    if labels is not None and not 0 <= labels[row] < classes:
        raise OperandError(
            f"labels[{row}] is {int(labels[row])}; it must be in 0..{classes - 1}, as there are {classes} classes."
        )
    raise OperandError(
        f"the teacher's indices[{row}] are {indices[row].tolist()}; they must be in 0..{classes - 1}, "
        f"as there are {classes} classes."
    )
