"""What dividing a run among ranks costs: measured on the ranks themselves, or predicted from a profile."""

from __future__ import annotations

import dataclasses
import functools
import os
import statistics
import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from stablekd_fast.blocks import PairedBlocks
from stablekd_fast.cache.columns import Column
from stablekd_fast.data import Batch, TrainSource
from stablekd_fast.distributed import Layout, Ranks
from stablekd_fast.engine.schedule import PlannedStage, group_name
from stablekd_fast.engine.step import named_parameters_of
from stablekd_fast.errors import ConfigError
from stablekd_fast.execution.process import spare_processors
from stablekd_fast.execution.timing import REPEATS, seconds, timed
from stablekd_fast.objectives import Objectives
from stablekd_fast.planning.assign import GroupCost, ReduceCost, best_layout, linear
from stablekd_fast.planning.networks import measure_students, measure_teacher
from stablekd_fast.planning.profiles import Profile, predicted_blocks

_SIZES = (1 << 12, 1 << 22)
_REPEATS = 5
_LOADED = 4
"""Batches."""
_PROBED_ROWS = 64
_PROBED_BYTES = 64 << 20
"""More than a processor's caches hold."""


def measured_layouts(
    paired: PairedBlocks,
    objectives: Objectives,
    groupings: Sequence[list[list[int]]],
    source: TrainSource,
    ranks: Ranks,
    *,
    columns: Mapping[int, Column],
    live: bool,
    axis: str = "auto",
    accumulate: int = 1,
    capture: str = "eager",
) -> list[Layout]:
    """How ranks divide stages, whose groups are `groupings`, best: by costs that all of them measure at the same time.

    Args:
        columns: what is cached of the teacher.
        live, axis, accumulate: as `best_layout` takes them.
        capture: the mode in which steps will run, and in which they are timed.
    """
    device, batch = source.device, next(source.batches(0, 1))
    costs = _measured_groups(paired, objectives, groupings, batch, columns, ranks, device, capture)
    how = {"live": live, "axis": axis, "accumulate": accumulate, "image_seconds": _measured_images(source, ranks)}
    reduce = _measured_reduce(ranks, device)
    return [best_layout(groups, ranks.size, source.batch_size, reduce, **how) for groups in costs]


def _measured_groups(
    paired: PairedBlocks,
    objectives: Objectives,
    groupings: Sequence[list[list[int]]],
    batch: Batch,
    columns: Mapping[int, Column],
    ranks: Ranks,
    device: torch.device,
    capture: str = "eager",
) -> list[list[GroupCost]]:
    """Costs of each stage's groups, averaged over ranks."""
    count = len(batch.labels)
    part = max(count // ranks.size, min(2, count))  # batch norm needs two images
    students, teachers = [], []
    for size in (part, count):
        images = dataclasses.replace(
            batch, images=batch.pixels[:size], labels=batch.labels[:size], sample_ids=batch.sample_ids[:size]
        )
        students.append(measure_students(paired, objectives, groupings, images, device, capture))
        pixels = images.pixels.to(device)
        teachers.append(measure_teacher(paired, pixels, capture) if paired.cuts else [0.0] * len(paired))
    told = ranks.all_gather((students, teachers, _measured_feeds(columns, device)))

    def cost(group: list[int]) -> GroupCost:
        name = group_name(group)
        student = [statistics.mean(one[0][which][name] for one in told) for which in (0, 1)]
        teacher = [statistics.mean(sum(one[1][which][block] for block in group) for one in told) for which in (0, 1)]
        read = objectives.teacher_outputs([group], len(paired.cuts)) & columns.keys()
        feeds = {output: statistics.mean(one[2].get(output, 0.0) for one in told) for output in read}
        sizes = (part, count)
        return GroupCost(
            linear(*zip(sizes, student)), linear(*zip(sizes, teacher)), _gradient_bytes(paired, group), feeds
        )

    return [[cost(group) for group in groups] for groups in groupings]


def _measured_feeds(columns: Mapping[int, Column], device: torch.device) -> dict[int, float]:
    """Seconds per image that a rank's training loses to reading and decoding a row of each column on disk.

    Empty where rows come beside it: to a GPU, or by cores that training leaves free. Measured on Linux only.
    """
    if device.type != "cpu" or not hasattr(os, "memfd_create") or spare_processors():
        return {}
    forms = {output: column.format for output, column in columns.items() if column.on_disk}
    reading = {size: _seconds_of_reading(size) for size in {form.row_bytes for form in forms.values()}}
    feeds = {}
    for output, form in forms.items():
        parts = [torch.zeros((_PROBED_ROWS, *part.shape), dtype=part.dtype) for part in form.parts]
        decoding = seconds(functools.partial(form.decode, parts), device)
        feeds[output] = (decoding + reading[form.row_bytes]) / _PROBED_ROWS
    return feeds


def _seconds_of_reading(size: int) -> float:
    """For some rows of `size` bytes out of files that lie in main memory, and for a copy of them."""
    rows = max(_PROBED_BYTES // size, _PROBED_ROWS)
    turns = iter(np.random.default_rng(0).integers(rows, size=(REPEATS + 1, _PROBED_ROWS)).tolist())
    with open(os.memfd_create("rows"), "r+b", buffering=0) as file:
        file.write(bytes(rows * size))
        out = torch.empty(_PROBED_ROWS, size, dtype=torch.uint8)
        places = [memoryview(row) for row in out.numpy()]

        def read() -> None:
            for row, place in zip(next(turns), places):
                os.preadv(file.fileno(), [place], row * size)
            out.clone()

        return seconds(read, out.device)


def _gradient_bytes(paired: PairedBlocks, group: list[int]) -> int:
    return sum(parameter.nbytes for parameter in named_parameters_of(paired, group).values())


def _measured_reduce(ranks: Ranks, device: torch.device) -> ReduceCost:
    """Time a small and a large all-reduce over all ranks, two at least."""
    times = []
    for size in _SIZES:
        values, taken = torch.zeros(size // 4, device=device), []
        for _ in range(_REPEATS):
            start = time.perf_counter()
            float(ranks.all_reduce(values)[0])  # waits for a GPU
            taken.append(time.perf_counter() - start)
        times.append(statistics.median(taken))
    sent = [ReduceCost.sent(size, ranks.size) for size in _SIZES]
    per_byte = max((times[1] - times[0]) / (sent[1] - sent[0]), 0.0)
    both = ranks.all_gather([max(times[0] - per_byte * sent[0], 0.0), per_byte])
    return ReduceCost(*(statistics.mean(values) for values in zip(*both)))


def _measured_images(source: TrainSource, ranks: Ranks) -> float:
    """Seconds that a rank's loader takes for an image; next to none where images lie in memory."""
    if source.split.resident:
        return 0.0
    count, taken = timed(lambda: sum(len(batch.labels) for batch in source.batches(0, _LOADED)), source.device)
    return statistics.mean(ranks.all_gather(taken / count))


def predicted_scaling(
    device: Profile,
    paired: PairedBlocks,
    stages: Sequence[PlannedStage],
    batch: int,
    counts: Sequence[int],
    *,
    live: bool,
) -> list[dict]:
    """What a run would do on each number of ranks: its meshes, images per second and efficiency, all predicted.

    The batch is the same for all of them. `live`: the teacher runs; otherwise all its outputs come from a cache.
    Numbers of ranks that cannot divide the batch are left out.
    """
    stage_costs = _predicted(device, paired, stages)
    rows, alone, image_seconds = [], None, 1 / device.images_per_second
    for count in counts:
        try:
            layouts = [
                best_layout(costs, count, batch, device.reduce(count), live=live, image_seconds=image_seconds)
                for costs in stage_costs
            ]
        except ConfigError:
            continue
        steps = [max(*at.seconds, batch / at.data * image_seconds) for at in layouts]
        lengths = [planned.last - planned.first for planned in stages]
        speed = batch * sum(lengths) / sum(length * step for length, step in zip(lengths, steps))
        alone = alone or speed
        rows.append(
            {
                "ranks": count,
                "blocks x data, by stage": ", ".join(f"{at.blocks} x {at.data}" for at in layouts),
                "images/s": speed,
                "efficiency": speed / (alone * count / counts[0]),
            }
        )
    return rows


def _predicted(device: Profile, paired: PairedBlocks, stages: Sequence[PlannedStage]) -> list[list[GroupCost]]:
    """Predict the costs of each stage's groups. Blocks are predicted once for each number of images."""
    blocks = functools.cache(lambda images: predicted_blocks(device, paired, images))

    def cost(group: list[int]) -> GroupCost:
        return GroupCost(
            student=lambda images: sum(blocks(images)[1][group_name([k])] for k in group),
            teacher=lambda images: sum(blocks(images)[0][k] for k in group),
            gradient_bytes=_gradient_bytes(paired, group),
        )

    return [[cost(group) for group in planned.stage.groups] for planned in stages]
