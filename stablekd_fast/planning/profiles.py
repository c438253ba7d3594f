"""Costs on devices that are not at hand, from published speeds. All that follows from them is predicted, not
measured."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path

from stablekd_fast.blocks import PairedBlocks
from stablekd_fast.cache.codecs import RowFormat
from stablekd_fast.cache.speed import CodecCost, TierCost
from stablekd_fast.engine.schedule import group_name
from stablekd_fast.errors import ConfigError, nearest
from stablekd_fast.files.reading import read_document
from stablekd_fast.planning.assign import ReduceCost

_FOLDER = Path(__file__).parent / "devices"
_BACKWARD = 2.0
"""A backward pass has about twice the arithmetic of a forward pass."""
_PASSES = 4.0
"""How often a step reads or writes an activation: a layer stores it, the next and the loss read it, backward again."""


@dataclass(frozen=True)
class Profile:
    """A device's speeds: FLOP/s and bytes/s as published, and the fraction of each that networks are assumed to
    reach."""

    name: str
    source: str
    flops: float
    memory_bandwidth: float
    memory_bytes: float
    link_bandwidth: float
    disk_read: float
    disk_write: float
    images_per_second: float
    """The loader's speed."""
    flops_share: float
    bandwidth_share: float
    interconnect_bandwidth: float = 0.0
    """Between the devices of one node, each way."""
    network_bandwidth: float = 0.0
    """Between nodes, of one device."""
    ranks_per_node: int = 1
    reduce_latency: float = 0.0
    """Seconds until an all-reduce begins to move data."""
    kernel_seconds: float = 0.0
    """From one kernel of a replayed graph to the next, where neither has much to do."""

    @property
    def bandwidth(self) -> float:
        return self.memory_bandwidth * self.bandwidth_share

    def block(self, flops: float, activation_bytes: float, layers: int) -> float:
        """Seconds of a forward pass: the slower of arithmetic and of memory, each layer storing and reading its
        output."""
        return max(flops / (self.flops * self.flops_share), 2 * layers * activation_bytes / self.bandwidth)

    def reduce(self, ranks: int) -> ReduceCost:
        """Within a node, or between nodes where the ranks need several. Raises ConfigError for a profile without
        links."""
        link = self.interconnect_bandwidth if ranks <= self.ranks_per_node else self.network_bandwidth
        if ranks > 1 and not link:
            raise ConfigError(
                f"The profile {self.name} states no interconnect_bandwidth and network_bandwidth, which several "
                "ranks need."
            )
        return ReduceCost(self.reduce_latency, 1 / (link * self.bandwidth_share)) if ranks > 1 else ReduceCost()

    def tiers(self, budgets: dict[str, float]) -> dict[str, TierCost]:
        link, memory = 1 / self.link_bandwidth, 2 / self.bandwidth
        made = {
            "device": TierCost({"device": memory}, {"device": memory}, min(budgets["device"], 0.8 * self.memory_bytes)),
            "host": TierCost({"link": link}, {"link": link}, budgets["host"]),
            "disk": TierCost(
                {"disk": 1 / self.disk_read, "link": link}, {"disk": 1 / self.disk_write, "link": link}, budgets["disk"]
            ),
        }
        return {tier: cost for tier, cost in made.items() if cost.budget > 0}

    def codec(self, form: RowFormat, batch: int) -> CodecCost:
        """Encoding and decoding pass over the values once in each width."""
        values = 4 * math.prod(form.shape) * batch
        passes = 0.0 if form.lossless else (values + form.row_bytes * batch) / self.bandwidth
        return CodecCost(form.row_bytes, passes, passes, exact=form.lossless)


def profile(name: str) -> Profile:
    """A profile by name, or from a JSON file. Raises ConfigError if there is none."""
    known = {path.stem: path for path in _FOLDER.glob("*.json")}
    path = known.get(name, Path(name))
    if not path.exists():
        raise ConfigError(
            f"There is no device profile {name!r}{nearest(name, [*known, 'this-machine'])}; or give a JSON file."
        )
    try:
        values = json.loads(read_document(path))
        return Profile(**values)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        wanted = ", ".join(field.name for field in fields(Profile))
        raise ConfigError(f"{path} is no device profile ({error}); it needs {wanted}.") from error


def predicted_blocks(device: Profile, paired: PairedBlocks, batch: int) -> tuple[list[float], dict[str, float]]:
    """Seconds per batch of each teacher block, and of each student block's step by its group's name."""
    teacher, student = [], {}
    for k in range(len(paired)):
        sizes = _activation_bytes(paired, k, batch)
        blocks = paired.teacher_blocks[k], paired.student_blocks[k]
        teacher.append(device.block(paired.teacher_flops[k] * batch, sizes[0], _layers(blocks[0])))
        forward = device.block(paired.student_flops[k] * batch, sizes[1], _layers(blocks[1]))
        student[group_name([k])] = (1 + _BACKWARD) * forward + _PASSES * sizes[1] / device.bandwidth
    return teacher, student


def _activation_bytes(paired: PairedBlocks, k: int, batch: int) -> tuple[float, float]:
    """Return the bytes of one layer's output in teacher and student block `k`, taken to be as large as the block's."""
    if k == len(paired.cuts):
        return 0.0, 0.0
    cut = paired.cuts[k]
    return 4 * math.prod(cut.teacher_shape) * batch, 4 * math.prod(cut.student_shape) * batch


def _layers(block) -> int:
    """Operations that store their output."""
    return sum(1 for module in block.modules() if not list(module.children()))
