"""Scalars for TensorBoard, where it is installed. The only file that imports it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from stablekd_fast.errors import ConfigError


def open_scalars(directory: Path, tensorboard: bool | Literal["auto"], resume_step: int | None) -> Scalars | NoScalars:
    """Something with `show(event)` and `close()`. Raises ConfigError if TensorBoard is asked for and missing."""
    if tensorboard is False:
        return NoScalars()
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        if tensorboard == "auto":
            return NoScalars()
        raise ConfigError(
            f"TensorBoard was asked for, but cannot be imported ({error}). "
            "Run `pip install tensorboard`, or leave it out."
        ) from error
    # Hides what the unfinished run wrote to this directory after the step from which this run continues.
    purge_step = 0 if resume_step is None else resume_step + 1
    return Scalars(SummaryWriter(str(directory), purge_step=purge_step))


class NoScalars:
    """Writes nothing."""

    def show(self, event: dict) -> None: ...

    def close(self) -> None: ...


class Scalars:
    """Writes the numbers of events as scalars."""

    def __init__(self, writer) -> None:
        self._writer = writer

    def show(self, event: dict) -> None:
        for tag, value in _scalars(event):
            if value is not None:
                self._writer.add_scalar(tag, value, event["step"], walltime=event["time"])

    def close(self) -> None:
        self._writer.close()


def _scalars(event: dict) -> Iterator[tuple[str, float | None]]:
    if event["kind"] == "train":
        for group, loss in event["losses"].items():
            yield f"loss/{group}", loss
        for name in ("lr", "images_per_second", "data_wait_share"):
            yield f"train/{name}", event[name]
    elif event["kind"] == "evaluate":
        for name in ("accuracy", "top5", "loss", "cosine", "relative_error"):
            if name in event:
                yield f"{event['split']}/{name}", event[name]
    elif event["kind"] == "merge":
        for cut, gap in event["exposure_gap"].items():
            yield f"exposure_gap/{cut}", gap
