"""Times rivals fairly: checked first, then interleaved in one process with the same threads and allocator.

A `Case` holds one task and its `Contender`s. `measure` compares every contender's result with a reference in double
precision, and refuses the whole case if one is wrong. Then it times them in rounds: in each round every contender
once, in an order shuffled anew, so that whatever slows the machine meets all of them alike.
"""

from __future__ import annotations

import gc
import math
import os
import random
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch._inductor.config
from torch import Tensor

from stablekd_fast.errors import StableKDError
from stablekd_fast.execution.memory import keep_freed_memory, no_garbage_collection
from stablekd_fast.report import machine

Result = Tensor | Sequence[Tensor]
Tolerance = float | Sequence[float]
Role = Literal["rival", "ours", "limit"]

TIMING_SECONDS = {"cpu": 2e-3, "cuda": 20e-3}
"""A timing lasts at least about this long, by kind of device: faster contenders are called several times in a row. So
the host runs ahead of a GPU, as it does in training, instead of waiting for it after each call."""

WARM_UP_ROUNDS = 2

SEED = 0
"""Fixes the order within rounds, and the networks, data and views that benches make."""


class WrongResult(StableKDError):
    """A contender's numbers differ from the reference; its case shows no speed."""


@dataclass(frozen=True)
class Contender:
    """One way to do a case's task.

    `prepare` runs before each timing and is not timed. Contenders of one name that differ in `variant` are settings
    of one rival: the fastest stands for the name. `expected` and `tolerance` replace those of the case where the
    contender computes something else (a memory floor, a rival on easier terms). What does less than the task has the
    `role` "limit". `flops` are the floating-point operations of a call where arithmetic is the limit, and
    `limit` replaces that of the case. `extras` go into its row.
    """

    name: str
    call: Callable[[], Result]
    variant: str = ""
    prepare: Callable[[], None] | None = None
    expected: Callable[[], Result] | None = None
    tolerance: Tolerance | None = None
    role: Role = "rival"
    flops: float | None = None
    limit: str | None = None
    extras: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name} ({self.variant})" if self.variant else self.name


@dataclass(frozen=True)
class Case:
    """One task. `expected` gives its result in float64.

    `tolerance` bounds, for each tensor of a result, the largest error over the reference's largest magnitude; one
    number serves all tensors. `extras` go into every row. `limit` names the contender that does only what cannot be
    avoided: every row says how close it comes.
    """

    bench: str
    name: str
    contenders: Sequence[Contender]
    baseline: str
    expected: Callable[[], Result]
    tolerance: Tolerance
    extras: dict[str, Any] = field(default_factory=dict)
    limit: str | None = None


@dataclass(frozen=True)
class Timing:
    """The seconds per call of one contender, one number per round; `calls` were made per timing."""

    contender: Contender
    calls: int
    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass
class Measured:
    """What a bench found: rows of its cases, further tables by title, and under which settings.

    `refused`: why cases have no rows. `origin`: machine, versions and settings, if not those of here and now.
    """

    rows: list[dict] = field(default_factory=list)
    tables: dict[str, list[dict]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    origin: dict[str, dict] = field(default_factory=dict)

    def take(self, find: Callable[[], list[dict]], show: Callable[[list[dict]], None]) -> list[dict]:
        """Keep, show and return the rows that `find` gives; if a result is wrong, none, and the reason in `refused`."""
        try:
            rows = find()
        except WrongResult as error:
            self.refused.append(str(error))
            return []
        show(rows)
        self.rows += rows
        return rows


def measure_cases(
    cases: Iterable[Case], rounds: int, show: Callable[[list[dict]], None] = lambda rows: None, *, device: str = "cpu"
) -> Measured:
    """Measure one case after the other, and show each case's rows as it is done."""
    measured = Measured()
    for case in cases:
        measured.take(partial(measure, case, rounds, device=device), show)
    return measured


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """Give a folder in `folder` for the time of a bench; it is there once something is put into it."""
    own = folder / f".bench-{os.getpid()}"
    try:
        yield own
    finally:
        shutil.rmtree(own, ignore_errors=True)


@contextmanager
def pinned(threads: int | None = None) -> Iterator[dict]:
    """Let torch, its compiler and the C++ core use `threads` threads (all usable cores by default) for a while.

    The allocator keeps freed memory, then and afterwards. Gives the settings for the record, with how busy the machine
    was.
    """
    before = torch.get_num_threads()
    threads = threads or machine()["usable_cores"] or before
    kept = keep_freed_memory()
    torch.set_num_threads(threads)
    try:
        with torch._inductor.config.patch({"cpp.threads": threads}):
            yield {
                "threads": threads,
                "allocator": "glibc, freed memory kept" if kept else "as it is",
                "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
            }
    finally:
        torch.set_num_threads(before)


def measure(
    case: Case,
    rounds: int,
    *,
    device: str = "cpu",
    seed: int = SEED,
    clock: Callable[[], float] = time.perf_counter,
    watch: Callable[[Contender], None] = lambda contender: None,
) -> list[dict]:
    """Check and time a case; return one row per name, in the order of the contenders.

    `watch` is told each contender just before it is timed. Raises WrongResult before anything is timed.
    """
    check(case)
    return rows(case, time_rounds(case.contenders, rounds, device=device, seed=seed, clock=clock, watch=watch))


def check(case: Case) -> None:
    """Compare every contender with the reference. Raises WrongResult naming case, contender and error."""
    common = _tensors(case.expected())
    for contender in case.contenders:
        if contender.prepare:
            contender.prepare()
        expected = _tensors(contender.expected()) if contender.expected else common
        tolerance = case.tolerance if contender.tolerance is None else contender.tolerance
        _compare(f"{case.bench}, {case.name}: {contender}", _tensors(contender.call()), expected, tolerance)


def time_rounds(
    contenders: Sequence[Contender],
    rounds: int,
    *,
    device: str = "cpu",
    seed: int = SEED,
    clock: Callable[[], float] = time.perf_counter,
    watch: Callable[[Contender], None] = lambda contender: None,
) -> list[Timing]:
    """Time the contenders in `rounds` interleaved rounds, after warm-up rounds that also find the calls per timing.

    Each timing follows one untimed call of the same contender: none profits from what another left in the caches.
    """
    shuffle = random.Random(seed).shuffle
    calls, least = [1] * len(contenders), TIMING_SECONDS[torch.device(device).type]
    seconds: list[list[float]] = [[] for _ in contenders]
    gc.collect()
    with no_garbage_collection():
        for number in range(-WARM_UP_ROUNDS, rounds):
            order = list(range(len(contenders)))
            shuffle(order)
            for i in order:
                watch(contenders[i])
                taken = _time(contenders[i], calls[i], device, clock)
                if number >= 0:
                    seconds[i].append(taken)
                else:
                    calls[i] = max(1, math.ceil(least / taken)) if taken > 0 else calls[i]
    return [Timing(*one) for one in zip(contenders, calls, seconds)]


def rows(case: Case, timings: Sequence[Timing]) -> list[dict]:
    """Return one row per name.

    `spread_seconds` is half the interquartile range over the rounds. `ratio` is the median over the rounds of
    baseline time / own time: within a round both met the same machine, so this is steadier than a ratio of medians.
    `limit_seconds` is what the contender `limit` takes for the same work, and `share_of_limit` the median over the
    rounds of that time / own time.
    """
    fastest: dict[str, Timing] = {}
    for timing in timings:
        name = timing.contender.name
        if name not in fastest or _cost(timing) < _cost(fastest[name]):
            fastest[name] = timing
    return [_row(case, timing, fastest) for timing in fastest.values()]


def _row(case: Case, timing: Timing, fastest: dict[str, Timing]) -> dict:
    contender = timing.contender
    row = {
        "bench": case.bench,
        "case": case.name,
        "contender": contender.name,
        "role": contender.role,
        "median_seconds": timing.median,
        "spread_seconds": _half_interquartile_range(timing.seconds),
        "ratio": _ratio(fastest[case.baseline], timing),
        "baseline": case.baseline,
        "variant": contender.variant,
        "rounds": len(timing.seconds),
        "calls": timing.calls,
        **case.extras,
        **contender.extras,
    }
    if "images" in row:
        row["images_per_second"] = row["images"] / timing.median
    if contender.flops:
        row |= {"flops": contender.flops, "gflops_per_second": contender.flops / timing.median / 1e9}
    name = contender.limit or case.limit
    return row if name is None else row | _beside_limit(timing, fastest[name])


def _beside_limit(timing: Timing, limit: Timing) -> dict:
    work = timing.contender.flops / limit.contender.flops if limit.contender.flops else 1.0
    return {
        "limit": limit.contender.name,
        "limit_seconds": work * limit.median,
        "share_of_limit": work * _ratio(limit, timing),
    }


def _cost(timing: Timing) -> float:
    """Return seconds for the same work."""
    return timing.median / (timing.contender.flops or 1.0)


def _time(contender: Contender, calls: int, device: str, clock: Callable[[], float]) -> float:
    """Return seconds per call."""
    if contender.prepare:
        contender.prepare()
    contender.call()
    _wait(device)
    start = clock()
    for _ in range(calls):
        contender.call()
    _wait(device)
    return (clock() - start) / calls


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def _compare(who: str, found: list[Tensor], expected: list[Tensor], tolerance: Tolerance) -> None:
    if [tensor.shape for tensor in found] != [tensor.shape for tensor in expected]:
        shapes = [[list(tensor.shape) for tensor in side] for side in (found, expected)]
        raise WrongResult(f"{who} returns tensors of shapes {shapes[0]}; {shapes[1]} are expected. No speed is shown.")
    bounds = [tolerance] * len(expected) if isinstance(tolerance, (int, float)) else tolerance
    for place, (value, reference, bound) in enumerate(zip(found, expected, bounds, strict=True)):
        error = relative_error(value, reference)
        if not error <= bound:
            raise WrongResult(
                f"{who} is wrong: the largest error of its result {place} is {error:.3g} of the reference's largest "
                f"magnitude; at most {bound:.3g} is allowed. No speed is shown."
            )


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Return the largest error over the reference's largest magnitude; NaN where one of the values is NaN."""
    if reference.numel() == 0:
        return 0.0
    largest = reference.double().abs().max().clamp_min(1e-300)
    return float((value.double() - reference.double()).abs().max() / largest)


def _tensors(result: Result) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _ratio(other: Timing, own: Timing) -> float:
    return statistics.median(theirs / ours for theirs, ours in zip(other.seconds, own.seconds))


def _half_interquartile_range(values: list[float]) -> float:
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2
