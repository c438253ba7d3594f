"""`stablekd bench budget`: what a step costs a GPU, counted without one.

A step is made as a run makes it on a GPU, and what it gives the device to do is counted on fake CUDA tensors
(`bench/standin/budget.py`). A profile of published speeds then says how long that takes at least. Where there is a GPU
the same steps are profiled too.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch

from stablekd_fast import models
from stablekd_fast.bench.core import SEED, Measured
from stablekd_fast.bench.runs.budget_steps import (
    CPU,
    FED_BY,
    Counted,
    Profiled,
    Steps,
    Way,
    counted,
    host_seconds,
    profiled,
)
from stablekd_fast.bench.standin.kernel_table import KINDS, Work
from stablekd_fast.blocks import pair_blocks, pick_fusion, serve
from stablekd_fast.engine.schedule import Optimizer, merge_neighbours
from stablekd_fast.errors import ConfigError
from stablekd_fast.execution.precision import Precision
from stablekd_fast.planning.profiles import Profile, profile
from stablekd_fast.run.builders import pick_image_dtype

KERNELS, BYTES = "kernels of a step, counted", "bytes of a step, counted"
TIME = "milliseconds of a step on {}: predicted, not measured"
ARITHMETIC, MEASURED = "how they were predicted", "kernels and copies of a step, counted and measured on {}"
_BF16 = 2
"""Profiles state the speed of TF32; that of bf16 is twice as high on the GPUs that have both."""


@dataclass(frozen=True)
class Question:
    """Whose steps are counted, and for which device times are predicted.

    Raises ConfigError for numbers below 1.
    """

    teacher: str
    student: str
    image_size: int = 32
    batch_size: int = 128
    classes: int = 10
    optimizer: str = "adamw"
    device_profile: str = "h100"
    fold_teacher: str = "auto"

    def __post_init__(self) -> None:
        for name in ("image_size", "batch_size", "classes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} was given; it must be at least 1.")

    def steps(self, device: torch.device) -> Steps:
        """Build the pair with random weights on a device, computing as a run on a GPU does by default."""
        torch.manual_seed(SEED)
        teacher, student = (
            models.build(name, self.classes, self.image_size).to(device).to(memory_format=torch.channels_last)
            for name in (self.teacher, self.student)
        )
        images = torch.randn(2, 3, self.image_size, self.image_size, device=device)
        paired = pair_blocks(teacher, student, images)
        torch.nn.ModuleList([paired.teacher, *paired.teacher_blocks]).eval()
        paired.precision, paired.fuses_norms = Precision("bf16"), pick_fusion("auto", torch.device("cuda"))
        # Made on a CPU, where `auto` would not fold, for a GPU, where it does.
        fold = "on" if self.fold_teacher == "auto" else self.fold_teacher
        paired = serve(paired, images.contiguous(memory_format=torch.channels_last), fold)
        dtype = pick_image_dtype(paired, images)
        return Steps(paired, self.image_size, self.batch_size, Optimizer(self.optimizer), dtype)


def ways_of(blocks: int) -> list[Way]:
    """List the stages of a pair of so many blocks, from all apart to end to end, with all that can feed them."""
    return [Way(groups, fed_by) for groups in merge_neighbours(blocks) for fed_by in FED_BY]


def run_budget(question: Question) -> Measured:
    """Count, predict, and measure where there is a GPU."""
    device, steps = profile(question.device_profile), question.steps(CPU)
    ways = ways_of(len(steps.paired))
    host, found = host_seconds(steps, ways), counted(steps, ways)
    lines = list(zip(ways, found))
    tables = {
        KERNELS: [_kernels(way, one) for way, one in lines],
        BYTES: [_bytes(way, one) for way, one in lines],
        TIME.format(device.name): [
            _named(way) | predicted(one, device) | {"host_us": 1e6 * seconds}
            for (way, one), seconds in zip(lines, host)
        ],
        ARITHMETIC: [_named(way) | {"at_least": arithmetic(one, device)} for way, one in lines],
    }
    if torch.cuda.is_available():
        gpu = torch.device("cuda", torch.cuda.current_device())
        on_gpu = profiled(question.steps(gpu), ways, gpu)
        title = MEASURED.format(torch.cuda.get_device_name(gpu))
        tables[title] = [_beside(way, one, measured) for (way, one), measured in zip(lines, on_gpu)]
    return Measured(tables=tables, settings={"image_dtype": str(steps.image_dtype).removeprefix("torch.")})


def _named(way: Way) -> dict:
    return {"stage": way.stage, "fed_by": way.fed_by}


def _kernels(way: Way, found: Counted) -> dict:
    kinds: Counter[str] = Counter()
    for work in found.work:
        kinds[work.kind] += work.kernels
    row = _named(way) | {"all": kinds.total(), **{kind: kinds[kind] for kind in KINDS}}
    return row | {"outside_of_graphs": found.outside, "columns": found.columns}


def _bytes(way: Way, found: Counted) -> dict:
    """Megabytes: moved on the device, and shipped to it by memory and stream."""
    to_device = {way: size for way, size in found.shipments.items() if way.to_device}
    shipped = {
        "pinned": sum(size for way, size in to_device.items() if way.pinned and not way.apart),
        "pinned, another stream": sum(size for way, size in to_device.items() if way.pinned and way.apart),
        "pageable": sum(size for way, size in to_device.items() if not way.pinned),
    }
    row = _named(way) | {"moved_MB": sum(work.moved for work in found.work) / 1e6}
    row |= {f"shipped_MB, {kind}": size / 1e6 for kind, size in shipped.items()}
    row["copies to the device"] = sum(count for way, count in found.copies.items() if way.to_device)
    return row | {"gflop": sum(work.flops for work in found.work) / 1e9}


def predicted(found: Counted, device: Profile) -> dict:
    """Return milliseconds: of each limit alone; at least, the largest of them; one after the other, the sum over
    operations of what limits each. Copies on the stream that computes are added to both. The next batch is made ready
    beside the step, its copies and its work one after the other: if that takes longer than the step with all that the
    device has to do, it is what is returned."""
    launches, memory, products = _limits(found.work, device)
    link, ahead = _link(found, device)
    least, summed = max(launches, memory, products) + link, _one_by_one(found.work, device) + link
    return {
        "launches": 1e3 * launches,
        "memory": 1e3 * memory,
        "arithmetic": 1e3 * products,
        "link": 1e3 * (link + ahead),
        "at_least": 1e3 * max(least, ahead + max(_limits(found.beside, device))),
        "one_after_the_other": 1e3 * max(summed, ahead + _one_by_one(found.beside, device)),
    }


def _one_by_one(work: list[Work], device: Profile) -> float:
    return sum(max(_limits([one], device)) for one in work)


def _limits(work: list[Work], device: Profile) -> tuple[float, float, float]:
    """Return the seconds of launches, of memory and of arithmetic."""
    kernels, moved, flops = (sum(getattr(one, name) for one in work) for name in ("kernels", "moved", "flops"))
    return kernels * device.kernel_seconds, moved / device.bandwidth, flops / _speed(device)


def _speed(device: Profile) -> float:
    return _BF16 * device.flops * device.flops_share


def _link(found: Counted, device: Profile) -> tuple[float, float]:
    """Return the seconds of copies on the stream that computes, and on others beside it."""
    sides = Counter({False: 0, True: 0})
    for shipment, size in found.shipments.items():
        sides[shipment.apart] += size
    return sides[False] / device.link_bandwidth, sides[True] / device.link_bandwidth


def arithmetic(found: Counted, device: Profile) -> str:
    """Return the line that shows how `at_least` was predicted."""
    kernels, moved, flops = (sum(getattr(one, name) for one in found.work) for name in ("kernels", "moved", "flops"))
    limits, (link, ahead) = predicted(found, device), _link(found, device)
    terms = [
        f"{kernels} kernels x {1e6 * device.kernel_seconds:g} us = {limits['launches']:.2f} ms",
        f"{moved / 1e6:.0f} MB / {device.bandwidth / 1e9:.0f} GB/s = {limits['memory']:.2f} ms",
        f"{flops / 1e9:.1f} GFLOP / {_speed(device) / 1e12:.0f} TFLOP/s = {limits['arithmetic']:.2f} ms",
    ]
    line = f"max({', '.join(terms)})"
    if link:
        shipped = link * device.link_bandwidth / 1e6
        line += f" + {shipped:.2f} MB / {device.link_bandwidth / 1e9:.0f} GB/s = {1e3 * link:.2f} ms"
    if ahead:
        beside = 1e3 * max(_limits(found.beside, device))
        line += f", or beside it {1e3 * ahead:.2f} ms of copies, then {beside:.2f} ms of work"
    return f"{line}: {limits['at_least']:.2f} ms, predicted, not measured"


def _beside(way: Way, found: Counted, gpu: Profiled) -> dict:
    kernels = sum(work.kernels for work in found.work)
    return _named(way) | {
        "counted": kernels,
        "measured": gpu.kernels,
        "counted_over_measured": kernels / gpu.kernels,
        "device_ms": 1e3 * gpu.busy_seconds,
        "step_ms": 1e3 * gpu.step_seconds,
    }
