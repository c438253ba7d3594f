"""Planning for a pair of networks by name, before there is any data: the Python side of `stablekd plan`."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from stablekd_fast.cache.settings import CacheSettings, parse_bytes
from stablekd_fast.errors import ConfigError
from stablekd_fast.schedule import PlannedStage, method_stages, plan_stages

THIS_MACHINE = "this-machine"


@dataclass
class PairPlan:
    """How a pair is cut into blocks, and, with a budget, what of the teacher is worth keeping."""

    teacher: str
    student: str
    image_size: int = 224
    """Pixels."""
    classes: int = 1000
    cuts: list[Any] | None = None
    blocks: int | None = None
    bridge: str = "select"
    method: str = "stablekd"
    epochs: float = 60.0
    images: int = 1_281_167
    """Training images."""
    views: int | None = 1
    """Distinct views per image; None for endless new ones."""
    batch_size: int = 64
    budget_disk: str = "0"
    """Bytes for rows, e.g. 200GB."""
    budget_host: str = "0"
    budget_device: str = "0"
    codecs: list[str] = field(default_factory=lambda: ["fp32"])
    """Codecs allowed for activations: fp32, bf16, int8, fp8."""
    logits: str = "fp16"
    """Codec of the logits: fp32, fp16, or topK, e.g. top10."""
    device_profile: str = THIS_MACHINE
    """`this-machine` is measured; a100, h100 or a JSON file of published speeds gives predictions."""
    ranks: int | None = None
    """Processes that share the run: show how they would divide it, and how it would scale. Needs a profile."""
    directory: str | None = None
    """Where this machine's disk is measured; the folder for temporary files by default."""

    def __post_init__(self) -> None:
        for name in ("epochs", "images", "batch_size", "image_size", "classes"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}={getattr(self, name)} was given; it must be greater than 0.")
        if self.ranks is not None and self.ranks < 1:
            raise ConfigError(f"ranks={self.ranks} was given; it must be at least 1.")
        if self.ranks is not None and self.device_profile == THIS_MACHINE:
            raise ConfigError(
                "ranks was given, but no --device-profile with the speed of links between devices; give a100, h100 or a JSON file. "
                "A run under torchrun measures its ranks when it starts, and prints what it found."
            )
        if self.batch_size > self.images:
            raise ConfigError(f"A batch of {self.batch_size} does not fit {self.images} images.")

    @property
    def has_budget(self) -> bool:
        return any(parse_bytes(getattr(self, f"budget_{tier}"), f"budget_{tier}") for tier in ("disk", "host", "device"))

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

    def paired(self):
        """The networks with random weights, cut into blocks."""
        import torch

        from stablekd_fast import models
        from stablekd_fast.blocks import pair_blocks

        sides = [models.build(name, self.classes, self.image_size) for name in (self.teacher, self.student)]
        sides = [side.to(memory_format=torch.channels_last) for side in sides]
        example = torch.randn(2, 3, self.image_size, self.image_size)
        paired = pair_blocks(*sides, example, self.cuts or "auto", self.blocks, bridge=self.bridge)
        torch.nn.ModuleList([paired.teacher, *paired.teacher_blocks]).eval()
        return paired


class PairPlanned(NamedTuple):
    """Rows for tables: what is done with each output, and what the run takes; `basis` says where speeds come from."""

    decisions: list[dict]
    totals: list[dict]
    basis: str


def plan_pair(asked: PairPlan, paired) -> PairPlanned:
    """Decide for a pair, with speeds measured here or taken from a profile."""
    from stablekd_fast.cache.plan import Plan, best_plan, decisions, predict

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
                "busiest": ", ".join(max(loads, key=loads.get) for loads in prediction.filled),
                "gigabytes kept": sum(costs.bytes_of(output, kept) for output, kept in which.kept.items()) / 1e9,
            }
        )
    return PairPlanned(decisions(costs, plan), totals, basis)


def plan_ranks(asked: PairPlan, paired) -> dict[str, list[dict]]:
    """How a run scales to 64 ranks with one global batch, by title of a table. Predicted, not measured."""
    from stablekd_fast.cache.profiles import profile
    from stablekd_fast.divide import predicted_scaling

    device, stages = profile(asked.device_profile), _stages(asked, paired)
    counts = sorted({*(2**power for power in range(7)), asked.ranks})
    return {
        f"{where}, predicted, not measured, for {device.name}": predicted_scaling(
            device, paired, stages, asked.batch_size, counts, relays=relays
        )
        for where, relays in (("all of the teacher from a cache", False), ("live teacher, passed on from rank to rank", True))
    }


def _stages(asked: PairPlan, paired) -> list[PlannedStage]:
    per_epoch = asked.images // asked.batch_size
    return plan_stages(
        method_stages(asked.method, len(paired)), len(paired), max(round(asked.epochs * per_epoch), 1), per_epoch
    )


def _costs(asked: PairPlan, paired, settings: CacheSettings):
    import torch

    from stablekd_fast.assemble import objectives_of
    from stablekd_fast.cache.planner import Job, measured_costs, predicted_costs, views_shown
    from stablekd_fast.cache.profiles import profile
    from stablekd_fast.config import DistillConfig
    from stablekd_fast.data import Batch

    config, stages = DistillConfig(method=asked.method, epochs=asked.epochs), _stages(asked, paired)
    shown = views_shown(asked.views, asked.epochs)
    fill = min(shown * (asked.images // asked.batch_size), stages[-1].last)
    job = Job(paired, objectives_of(config), stages, settings, asked.images * shown, fill)
    if asked.device_profile != THIS_MACHINE:
        device = profile(asked.device_profile)
        example = torch.randn(2, 3, asked.image_size, asked.image_size).to(memory_format=torch.channels_last)
        examples = paired.teacher_outputs(example, job.wanted)
        basis = f"predicted, not measured, for {device.name} ({device.source})"
        return predicted_costs(job, device, examples, asked.batch_size), basis
    images = torch.randn(asked.batch_size, 3, asked.image_size, asked.image_size).to(memory_format=torch.channels_last)
    labels = torch.zeros(asked.batch_size, dtype=torch.int64)
    batch = Batch(torch.arange(asked.batch_size), 0, images, labels)
    basis = "from speeds measured on this machine's processor, without the loading of images"
    return measured_costs(job, batch, paired.teacher_outputs(images, job.wanted), torch.device("cpu"), 0.0), basis
