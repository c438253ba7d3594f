"""What a person sees on stderr while a run goes on."""

from __future__ import annotations

import sys
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from stablekd_fast.report.measures import measure_of, shown


class Display(Protocol):
    """Shows events as they come."""

    def start(self) -> None: ...

    def show(self, event: dict) -> None: ...

    def stop(self) -> None: ...


def open_display(progress: bool) -> Display:
    """A bar where stderr is a terminal, one line per evaluation where it is not; silence without `progress`."""
    if not progress:
        return Silence()
    return Bar(Console(stderr=True)) if sys.stderr.isatty() else Lines()


class Silence:
    """Shows nothing."""

    def start(self) -> None: ...

    def show(self, event: dict) -> None: ...

    def stop(self) -> None: ...


class Lines:
    """One plain line per evaluation, for log files and pipes."""

    def __init__(self) -> None:
        self._total_steps: int | None = None
        self._stage = ""

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def show(self, event: dict) -> None:
        if event["kind"] == "run_start":
            self._total_steps = event["total_steps"]
        elif event["kind"] == "stage_start":
            self._stage = f", stage {event['name']}"
        elif event["kind"] == "evaluate":
            of = f"/{self._total_steps}" if self._total_steps else ""
            line = f"step {event['step']}{of} (epoch {event['epoch']:.2f}{self._stage}): {_evaluation(event)}"
            print(line, file=sys.stderr, flush=True)
        elif event["kind"] in _SAID:
            print(_SAID[event["kind"]](event), file=sys.stderr, flush=True)
        elif event["kind"] == "ranks":
            print("\n".join(_ranks(event)), file=sys.stderr, flush=True)


class Bar:
    """A progress bar over the run's steps; under it speed, losses by group and the latest accuracy."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            speed_estimate_period=300,  # seconds; events come seldom, and stages differ in speed
        )
        self._task = self._progress.add_task("", total=None)
        self._details = {"speed": "", "losses": "", "accuracy": ""}
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4)

    def start(self) -> None:
        self._live.start()

    def stop(self) -> None:
        self._live.stop()

    def show(self, event: dict) -> None:
        kind = event["kind"]
        if kind == "run_start":
            self._progress.update(self._task, total=event["total_steps"], description=event["method"])
        elif kind == "resume":
            # The clock starts anew, so that the steps done before do not count as speed.
            self._progress.reset(self._task, completed=event["step"])
        elif kind == "stage_start":
            self._progress.update(self._task, description=event["name"])
        elif kind == "train":
            self._progress.update(self._task, completed=event["step"])
            self._details["speed"] = f"{_number(event['images_per_second'], '.0f')} images/s"
            losses = "  ".join(f"{name}: {_number(loss, '.4f')}" for name, loss in event["losses"].items())
            self._details["losses"] = f"loss  {losses}"
        elif kind == "evaluate":
            self._details["accuracy"] = _evaluation(event)
        elif kind in _SAID:
            self._live.console.print(_SAID[kind](event), markup=False, highlight=False)
        elif kind == "ranks":
            self._live.console.print("\n".join(_ranks(event)), markup=False, highlight=False)

    def _render(self) -> Group:
        details = "   ".join(text for text in self._details.values() if text)
        return Group(self._progress, Text(details, style="dim"))


def _evaluation(event: dict) -> str:
    measure = measure_of([event])
    other = "loss" if measure == "accuracy" else "relative_error"
    held = measure == "accuracy" and event.get("truth") == "teacher"
    what = "agreement with the teacher" if held else measure
    name = other.replace("_", " ")
    return f"{event['split']} {what} {shown(measure, event[measure])}, {name} {_number(event[other], '.4f')}"


def _teacher(event: dict) -> str:
    return f"teacher: {_number(event['accuracy'], '.2%')} of {event['images']} {event['split']} images"


def _data(event: dict) -> str:
    counts = (
        f"{event['training_images']:,} training images, {event['held_out']:,} held out, {event['test_images']:,} test"
    )
    threads = event.get("decoding_threads")
    decoded = f", decoded by {threads} threads" if threads else ""
    return f"{event['name']}: {event['classes']:,} classes, {counts}{decoded}"


_SAID = {"teacher": _teacher, "data": _data}
"""What events are shown as a line of their own, beside those of ranks."""


def _ranks(event: dict) -> list[str]:
    """A line for each rank of a stage that has ended."""
    mesh = f"stage {event['stage'] + 1} on {event['mesh']['blocks']} x {event['mesh']['data']} ranks (blocks x data)"
    return [
        f"{mesh}: rank {row['rank']} trained {', '.join(row['groups'])}, {row['measured_ms']:.1f} ms a step "
        f"(predicted {_number(row['predicted_ms'], '.1f')}), {_idle(row['idle_share'])}, "
        f"{row['gradient_bytes']:,.0f} bytes of gradients a step"
        for row in event["ranks"]
    ]


def _idle(share: float | None) -> str:
    return "idle time not known, as exchanges are captured" if share is None else f"idle {share:.0%}"


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)
