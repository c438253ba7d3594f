"""The event log of a run: one JSON object per line, written as things happen."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from pathlib import Path
from typing import Any, Literal

from stablekd_fast.errors import CheckpointError, TrainingError
from stablekd_fast.files import write_atomically
from stablekd_fast.files.owned import open_own
from stablekd_fast.files.reading import check_format, read_document
from stablekd_fast.report.progress import open_display
from stablekd_fast.report.tensorboard import open_scalars

LARGEST_LOG = 1 << 36
FORMAT = 1
"""What `run_start` says; logs without it are those of versions before."""
FILE_NAME = "events.jsonl"


class Recorder:
    """Writes events to `out_dir/events.jsonl` and shows them: progress on stderr, scalars in TensorBoard.

    Args:
        out_dir: directory of the run; made if it is missing.
        progress: show progress: a bar where stderr is a terminal, one line per evaluation elsewhere. False is silent.
        resume_step: the step from which a run continues. What was logged after it is dropped, because the resumed
            run will log it again. None starts a new log.
        tensorboard: True needs TensorBoard and raises ConfigError without it; "auto" uses it where it is installed.

    Use as a context manager; `emit` works inside. Raises TrainingError if the log cannot be written and
    CheckpointError if a log to be continued is damaged.
    """

    def __init__(
        self,
        out_dir: Path,
        *,
        progress: bool,
        resume_step: int | None = None,
        tensorboard: bool | Literal["auto"] = "auto",
    ) -> None:
        self.path = Path(out_dir) / FILE_NAME
        self._resume_step = resume_step
        self._display = open_display(progress)
        self._scalars = open_scalars(Path(out_dir) / "tensorboard", tensorboard, resume_step)

    def __enter__(self) -> Recorder:
        kept = [] if self._resume_step is None else self._keep_until(self._resume_step)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(open_own(self.path, os.O_WRONLY | os.O_APPEND), "a", encoding="utf-8")
            if self._resume_step is None:
                self._file.truncate(0)
        except OSError as error:
            raise self._unwritable(error) from error
        self._display.start()
        for event in kept:
            if event["kind"] == "run_start":  # the display needs the length of the run
                self._display.show(event)
        if self._resume_step is not None:
            self.emit("resume", step=self._resume_step)
        return self

    def __exit__(self, *_: object) -> None:
        self._display.stop()
        self._scalars.close()
        self._file.close()

    def emit(self, kind: str, **fields: Any) -> None:
        """Append one event. Tensors and numpy scalars become numbers, numbers that are not finite become null."""
        form = {"format": FORMAT} if kind == "run_start" else {}
        event = plain({"kind": kind, "time": time.time(), **form, **fields})
        try:
            self._file.write(json.dumps(event, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise self._unwritable(error) from error
        with contextlib.suppress(OSError, ValueError):  # the terminal is gone; the log goes on
            self._display.show(event)
        self._scalars.show(event)

    def _keep_until(self, step: int) -> list[dict]:
        if not self.path.exists():
            return []
        kept = [event for event in read_events(self.path.parent) if event.get("step", 0) <= step]
        write_atomically(self.path, "".join(json.dumps(event) + "\n" for event in kept).encode())
        return kept

    def _unwritable(self, error: OSError) -> TrainingError:
        return TrainingError(
            f"Could not write {self.path}: {error.strerror or error}. Free some space or choose another --out."
        )


class NoRecorder:
    """Records nothing; for a process whose events another process records."""

    def __enter__(self) -> NoRecorder:
        return self

    def __exit__(self, *_: object) -> None: ...

    def emit(self, kind: str, **fields: Any) -> None: ...


def read_events(run_dir: Path) -> list[dict]:
    """All events of a run, in order; none if it has no log. A torn last line, of a killed run, is left out.

    Raises CheckpointError, with the line's number, if another line is damaged.
    """
    path = Path(run_dir) / FILE_NAME
    if not path.exists():
        return []
    lines = read_document(path, LARGEST_LOG).split(b"\n")[:-1]
    events = []
    for number, line in enumerate(lines, 1):
        try:
            event = json.loads(line)
            form = event.get("format", FORMAT) if event["kind"] == "run_start" else FORMAT
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"{path} is damaged: line {number} is not an event but {line[:40]!r}. Remove that line, or the file."
            ) from error
        check_format(str(path), form, FORMAT, CheckpointError, "Go on with the one that wrote it.")
        events.append(event)
    return events


def plain(value: Any) -> Any:
    """Turn a value into JSON types: containers into dict and list, scalars into Python numbers, NaN and infinity into
    None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):  # a tensor or a numpy scalar
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
