"""Planning for a pair of networks by name, before there is any data: the Python side of `stablekd plan`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from stablekd_fast import models
from stablekd_fast.blocks import PairedBlocks, pair_blocks
from stablekd_fast.cache.columns import Plan
from stablekd_fast.cache.settings import CacheSettings, parse_bytes
from stablekd_fast.config import DistillConfig, objectives_of
from stablekd_fast.data import Batch
from stablekd_fast.engine.schedule import PlannedStage, group_name, method_stages, plan_stages
from stablekd_fast.errors import ConfigError, CutError
from stablekd_fast.objectives import method_named
from stablekd_fast.planning.assign import assign, loads_of
from stablekd_fast.planning.costs import Job, measured_costs, predicted_costs, views_shown
from stablekd_fast.planning.networks import measure_students
from stablekd_fast.planning.profiles import Profile, predicted_blocks, profile
from stablekd_fast.planning.ranks import predicted_scaling
from stablekd_fast.planning.rows import Costs, best_plan, decisions, predict

THIS_MACHINE = "this-machine"
_MOST_BLOCKS = 12


@dataclass
class PairPlan:
    """How a pair is cut into blocks, and, with a budget, what of the teacher is worth keeping."""

    teacher: str
    """The teacher's name: that of a CIFAR model, torchvision/NAME or timm/NAME."""
    student: str
    """The student's name, as for the teacher."""
    image_size: int = 224
    """The side of the images, in pixels."""
    classes: int = 1000
    """The number of classes."""
    cuts: list[Any] | None = None
    """Modules after which to cut; None finds cuts automatically."""
    blocks: int | None = None
    """How many blocks to cut into; None makes one per spatial size, and the classifier."""
    bridge: str = "select"
    """How the map between different widths is fitted: select, average or pca."""
    method: str = "stablekd"
    """One of stablekd, kd, kd+features, blocks, ce."""
    epochs: float = 60.0
    """How often the run goes through the training images."""
    images: int = 1_281_167
    """The number of training images."""
    views: int | None = 1
    """Distinct views per image; None for endless new ones."""
    batch_size: int = 64
    """Images of a batch, of all ranks together."""
    budget_disk: str = "0"
    """Most bytes of rows on disk, e.g. 200GB."""
    budget_host: str = "0"
    """Most bytes of rows in main memory."""
    budget_device: str = "0"
    """Most bytes of rows in the GPU's memory."""
    codecs: list[str] = field(default_factory=lambda: ["fp32"])
    """Codecs allowed for activations: fp32, bf16, int8, fp8."""
    logits: str = "fp16"
    """Codec of the logits: fp32, fp16, or topK, e.g. top10."""
    device_profile: str = THIS_MACHINE
    """`this-machine` is measured; a100, h100 or a JSON file of published speeds gives predictions."""
    ranks: int | None = None
    """Processes that share the run: show how evenly they could divide other numbers of blocks and, with a profile, how
    the run would scale."""
    directory: str | None = None
    """Where this machine's disk is measured; the folder for temporary files by default."""

    def __post_init__(self) -> None:
        for name in ("epochs", "images", "batch_size", "image_size", "classes"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}={getattr(self, name)} was given; it must be greater than 0.")
        if method_named(self.method).reuses_classifier:
            raise ConfigError(
                f"method={self.method} was given, but its student is put together in a run, and a plan is one for a "
                "pair as it is; plan for kd+features, which reads as much of the teacher."
            )
        if self.ranks is not None and self.ranks < 1:
            raise ConfigError(f"ranks={self.ranks} was given; it must be at least 1.")
        if self.batch_size > self.images:
            raise ConfigError(f"A batch of {self.batch_size} does not fit {self.images} images.")

    @property
    def has_budget(self) -> bool:
        return any(
            parse_bytes(getattr(self, f"budget_{tier}"), f"budget_{tier}") for tier in ("disk", "host", "device")
        )

    def settings(self, directory: str) -> CacheSettings:
        """`directory`: where the disk is measured."""
        disk = parse_bytes(self.budget_disk, "budget_disk")
        return CacheSettings(
            directory=directory if disk else None,
            disk_budget=self.budget_disk if disk else None,
            host_budget=self.budget_host,
            device_budget=self.budget_device,
            codecs=self.codecs,
            logits=self.logits,
        )

    def paired(self, blocks: int | None = None) -> PairedBlocks:
        """Build the networks with random weights, and cut them into blocks: as asked for, or into so many."""
        teacher, student = (
            models.build(name, self.classes, self.image_size).to(memory_format=torch.channels_last)
            for name in (self.teacher, self.student)
        )
        example = torch.randn(2, 3, self.image_size, self.image_size)
        cuts = "auto" if blocks or not self.cuts else self.cuts
        paired = pair_blocks(teacher, student, example, cuts, blocks or self.blocks, bridge=self.bridge)
        torch.nn.ModuleList([paired.teacher, *paired.teacher_blocks]).eval()
        return paired


class PairPlanned(NamedTuple):
    """Rows for tables: what is done with each output, and what the run takes; `basis` says where speeds come from."""

    decisions: list[dict]
    totals: list[dict]
    basis: str


def plan_pair(asked: PairPlan, paired: PairedBlocks) -> PairPlanned:
    """Decide for a pair, with speeds measured here or taken from a profile."""
    with tempfile.TemporaryDirectory(dir=asked.directory) as scratch:
        costs, basis = _costs(asked, paired, asked.settings(scratch))
    plan = best_plan(costs)
    totals = []
    for name, which in (("this plan", plan), ("relay alone", Plan())):
        prediction = predict(costs, which)
        totals.append(
            {
                "plan": name,
                "hours": prediction.seconds / 3600,
                "images/s, by stage": ", ".join(f"{speed:,.0f}" for speed in prediction.images_per_second(costs)),
                "busiest": ", ".join(max(loads, key=loads.__getitem__) for loads in prediction.filled),
                "gigabytes kept": sum(costs.bytes_of(output, kept) for output, kept in which.kept.items()) / 1e9,
            }
        )
    return PairPlanned(decisions(costs, plan), totals, basis)


def plan_ranks(asked: PairPlan, paired: PairedBlocks, ranks: int) -> dict[str, list[dict]]:
    """Show how so many ranks could divide the run, by title of a table: other numbers of blocks, and, with a profile,
    one global batch on 1 to 64 ranks."""
    title = (
        f"Blocks apart, all of the teacher from a cache, on {ranks} rank(s) that divide them, by the number of blocks"
    )
    if asked.device_profile == THIS_MACHINE:
        return {f"{title}, measured on this machine's processor": list(_by_number_of_blocks(asked, ranks, None))}
    device, stages = profile(asked.device_profile), _stages(asked, paired)
    counts = sorted({*(2**power for power in range(7)), ranks})
    label = f"predicted, not measured, for {device.name}"
    scaling = {
        f"{where}, {label}": predicted_scaling(device, paired, stages, asked.batch_size, counts, live=live)
        for where, live in (
            ("all of the teacher from a cache", False),
            ("live teacher, passed on from rank to rank", True),
        )
    }
    return {f"{title}, {label}": list(_by_number_of_blocks(asked, ranks, device))} | scaling


def _by_number_of_blocks(asked: PairPlan, ranks: int, device: Profile | None) -> Iterator[dict]:
    """Milliseconds of a step, the reading of rows left out; measured here, or predicted for a device. `efficiency` is
    the fraction of the ranks' time in which they train, as all wait for the busiest."""
    seconds = _seconds_of_students(asked, device)
    for count in range(max(ranks, 2), max(ranks, _MOST_BLOCKS) + 1):
        groups = [[k] for k in range(count)]
        try:
            times = seconds(asked.paired(count), groups)
        except CutError:
            continue
        costs = [times[group_name(group)] for group in groups]
        busiest = max(loads_of(costs, [{}] * count, assign(costs, ranks), ranks))
        yield {
            "blocks": count,
            "one rank, ms": 1e3 * sum(costs),
            "busiest rank, ms": 1e3 * busiest,
            "efficiency": sum(costs) / (ranks * busiest),
        }


def _seconds_of_students(
    asked: PairPlan, device: Profile | None
) -> Callable[[PairedBlocks, list[list[int]]], dict[str, float]]:
    """What gives the seconds of each group's step, by the group's name: a measurement here, or a prediction."""
    if device is not None:
        return lambda paired, groups: predicted_blocks(device, paired, asked.batch_size)[1]
    aims, batch = objectives_of(DistillConfig(method=asked.method)), _random_batch(asked)
    return lambda paired, groups: measure_students(paired, aims, [groups], batch, torch.device("cpu"))


def _stages(asked: PairPlan, paired: PairedBlocks) -> list[PlannedStage]:
    per_epoch = asked.images // asked.batch_size
    total_steps = max(round(asked.epochs * per_epoch), 1)
    return plan_stages(method_stages(asked.method, len(paired)), len(paired), total_steps, per_epoch)


def _costs(asked: PairPlan, paired: PairedBlocks, settings: CacheSettings) -> tuple[Costs, str]:
    """Costs of the pair, and in words where the speeds come from."""
    config, stages = DistillConfig(method=asked.method, epochs=asked.epochs), _stages(asked, paired)
    shown = views_shown(asked.views, asked.epochs)
    fill = min(shown * (asked.images // asked.batch_size), stages[-1].last)
    job = Job(paired, objectives_of(config), stages, settings, asked.images * shown, fill)
    if asked.device_profile != THIS_MACHINE:
        device = profile(asked.device_profile)
        example = torch.randn(2, 3, asked.image_size, asked.image_size).to(memory_format=torch.channels_last)
        examples = paired.teacher_outputs(example, job.wanted)
        basis = f"predicted, not measured, for {device.name} ({device.source})"
        return predicted_costs(job, device, examples, asked.batch_size, 3 * asked.image_size**2), basis
    batch = _random_batch(asked)
    basis = "from speeds measured on this machine's processor, without the loading of images"
    return measured_costs(job, batch, paired.teacher_outputs(batch.pixels, job.wanted), torch.device("cpu"), {}), basis


def _random_batch(asked: PairPlan) -> Batch:
    images = torch.randn(asked.batch_size, 3, asked.image_size, asked.image_size).to(memory_format=torch.channels_last)
    return Batch(torch.arange(asked.batch_size), 0, images, torch.zeros(asked.batch_size, dtype=torch.int64))
