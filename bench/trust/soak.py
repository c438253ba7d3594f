"""Long use of one process: what it holds must not grow, and steps must not become slower."""

from __future__ import annotations

import gc
import os
import shutil
import statistics
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from stablekd_fast import models
from stablekd_fast.config import DistillConfig
from stablekd_fast.data import open_dataset
from stablekd_fast.run.distiller import Distiller

SETTLED = 0.25
"""This share of the runs comes first and is not looked at: allocators and caches fill."""
ALLOWED = {"megabytes": 0.05, "files": 0.0, "threads": 0.0, "milliseconds per step": 0.01}
"""What each may grow by per run, beyond three standard errors of its slope: 0.05 MB are 25 MB in 500 runs, and 0.01 ms
of a step are 1% in 100 runs."""


def soak(folder: Path, first: int, minutes: float) -> Iterator[list[str]]:
    """Train runs of four stages with emulated captures, one after the other, in this process. Yields once per run, and
    with the last one what has grown. It begins anew whatever `first` is: the process is another."""
    data, seen, began = open_dataset("digits"), [], time.monotonic()
    while True:
        shutil.rmtree(folder / "out", ignore_errors=True)
        config = DistillConfig(
            method="stablekd", recipe="progressive", epochs=4.0, subset=160, validation=32, batch_size=16,
            bn_images=32, precision="fp32", device="cpu", capture="emulate", out=str(folder / "out"),
            cuts=["layer1", "layer2", "layer3"],
        )  # fmt: skip
        networks = [models.build("resnet20_half", 10, 8) for _ in range(2)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = Distiller(config, teacher=networks[0], student=networks[1], dataset=data).run(progress=False)
        seen.append(_looked(1e3 * result.wall_seconds / result.steps))
        ends = time.monotonic() - began > 60 * minutes
        yield grown(seen) if ends else []
        if ends:
            return


def _looked(milliseconds: float) -> dict[str, float]:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "megabytes": pages * os.sysconf("SC_PAGE_SIZE") / 1e6,
        "files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "milliseconds per step": milliseconds,
    }


def grown(seen: list[dict[str, float]]) -> list[str]:
    """What grows from run to run, after those at the beginning."""
    settled = seen[int(SETTLED * len(seen)) :]
    found = []
    for name, allowed in ALLOWED.items():
        slope, error = slope_of([one[name] for one in settled])
        if slope - 3 * error > allowed:
            found.append(f"{name} grow by {slope:.4g} ± {error:.2g} per run over {len(settled)} runs")
    return found


def slope_of(values: list[float]) -> tuple[float, float]:
    """The slope of a line through values, per value, and its standard error."""
    if len(values) < 3:
        return 0.0, 0.0
    places = list(range(len(values)))
    line = statistics.linear_regression(places, values)
    rest = [value - line.intercept - line.slope * at for at, value in zip(places, values)]
    spread = sum((at - statistics.mean(places)) ** 2 for at in places)
    return line.slope, (sum(one * one for one in rest) / (len(values) - 2) / spread) ** 0.5
