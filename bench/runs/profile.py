"""`stablekd bench step --profile`: where the time of a step goes."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from stablekd_fast.bench.core import Measured, pinned, scratch
from stablekd_fast.bench.runs.teacher import Arm, Images, Pair, cached, make_pair
from stablekd_fast.blocks import pick_fusion
from stablekd_fast.data import Dataset
from stablekd_fast.engine.step import GroupStep
from stablekd_fast.objectives import Objectives


class Phases:
    """Adds up seconds by block and phase; each is waited for on its device, and named in a trace."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: defaultdict[tuple[str, str], float] = defaultdict(float)

    @contextlib.contextmanager
    def timed(self, block: str, phase: str) -> Iterator[None]:
        self._wait()
        start = time.perf_counter()
        with torch.profiler.record_function(f"{phase}, block {block}" if block else phase):
            yield
            self._wait()
        self.seconds[block, phase] += time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def profile_steps(folder: Path, images: Images, trace: Path | None) -> Measured:
    """Return a table for each pair, as `profile_step` gives it. Leaves nothing in `folder`."""
    with scratch(folder) as own, pinned() as pins:
        profiles = {pair.name: profile_step(pair, dataset, own, trace) for pair, dataset in images.of_pairs()}
    tables = {f"{name}: milliseconds per step": rows for name, rows in profiles.items()}
    return Measured(tables=tables, settings=pins)


def profile_step(pair: Pair, dataset: Dataset, folder: Path, trace: Path | None, steps: int = 10) -> list[dict]:
    """Measure milliseconds per step of each block: forward, loss, backward and update; and of copying the batch in.

    They are means over `steps` decomposed steps from a cache. `trace` is a file for a Chrome trace of one more step.
    """
    paired, source, batches = make_pair(pair, dataset)
    paired.fuses_norms = pick_fusion("auto", torch.device("cpu"))
    arm = Arm(paired, cached(paired, source, batches, folder / "profile", "fp32"), batches)
    phases = Phases(arm.stage.inputs.device)
    for step in arm.stage.steps:
        step.objectives = _timed_objectives(step.objectives, phases, step.name)
    for _ in range(2):
        _profiled(arm, phases)
    phases.seconds.clear()
    for _ in range(steps):
        _profiled(arm, phases)
    rows = [_profile_row(step.name, phases, steps) for step in arm.stage.steps]
    copy = {
        "block": "all",
        **dict.fromkeys(("forward", "loss", "backward", "update")),
        "copy": 1e3 * phases.seconds["", "copy"] / steps,
    }
    if trace is not None:
        with torch.profiler.profile() as profiler:
            _profiled(arm, phases)
        profiler.export_chrome_trace(str(trace))
    return [*rows, copy]


def _profiled(arm: Arm, phases: Phases) -> None:
    arm.turn = (arm.turn + 1) % len(arm.batches)
    with phases.timed("", "copy"):
        arm.load()
    for step in arm.stage.steps:
        _profiled_group(step, phases)


def _profiled_group(step: GroupStep, phases: Phases) -> None:
    with phases.timed(step.name, "forward"):
        outputs, gradients, losses = step.forward()
    with phases.timed(step.name, "backward"):
        step.backward(outputs, gradients)
    with phases.timed(step.name, "update"):
        step.take_rates()
        step.update()
        step.note(torch.stack(losses).sum())


def _timed_objectives(objectives: Objectives, phases: Phases, block: str) -> Objectives:
    def timed(function: Callable) -> Callable:
        def call(*tensors):
            with phases.timed(block, "loss"):
                return function(*tensors)

        return call

    return dataclasses.replace(objectives, feature=timed(objectives.feature), logits=timed(objectives.logits))


def _profile_row(block: str, phases: Phases, steps: int) -> dict:
    milliseconds = {
        phase: 1e3 * phases.seconds[block, phase] / steps for phase in ("forward", "loss", "backward", "update")
    }
    milliseconds["forward"] -= milliseconds["loss"]  # the loss is computed within
    return {"block": block, **milliseconds, "copy": None}
