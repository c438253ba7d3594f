"""`stablekd bench step --device cuda`: whole training steps on a GPU, ours against loops as people tune them.

Rivals: the usual KD loop in torch's default settings, in bf16 and channels-last, that loop compiled, and that loop as
one CUDA graph, which is the fastest form of it that torch's documentation describes; and training without a teacher.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from stablekd_fast.bench.core import Case, Contender, Measured, Role, measure, pinned
from stablekd_fast.bench.peak import count_flops
from stablekd_fast.bench.runs.loops import GraphedLoop, Loop, OrdinaryBlockwise, OrdinaryKD, PlainTraining
from stablekd_fast.bench.runs.teacher import LARGE, Arm, Images, Pair, cached, make_pair
from stablekd_fast.blocks import pick_fusion, serve
from stablekd_fast.config import DistillConfig, objectives_of
from stablekd_fast.data import Dataset
from stablekd_fast.engine.feed import Feed
from stablekd_fast.engine.schedule import Optimizer
from stablekd_fast.execution.precision import Precision
from stablekd_fast.execution.side import Side
from stablekd_fast.teacher.live import LiveTeacher, Relay

TOLERANCES = {"fp32": 1e-2, "bf16": 5e-2}
"""The largest error of losses. torch's default for convolutions on a GPU is TF32: hence the first."""
LARGE_BATCH = 256
"""What fills a GPU at 224 px."""

Losses = Callable[[], list[Tensor]]


class FedAhead(Arm):
    """An arm whose next batch is made ready while it trains, as in a run."""

    feed: Feed | None = None

    def load(self) -> None:
        if self.feed is None:
            device, batches = self.stage.inputs.device, itertools.cycle(self.batches)
            self.feed = Feed(self.teacher, batches, self.stage.wanted, Side(device))
        self.feed.fetch()
        self.feed.serve(self.stage.inputs)
        self.feed.load(self.stage.inputs)


class DeviceContest:
    """Makes the networks of one pair anew for each contender, on a GPU (or on the CPU, to rehearse)."""

    def __init__(self, pair: Pair, dataset: Dataset, device: torch.device) -> None:
        self.pair, self.dataset, self.device = pair, dataset, device
        self.captured = "cudagraph" if device.type == "cuda" else "emulate"

    def rival(self, kind: type[Loop], *, tuned: bool = True, double: bool = False, **options) -> Loop:
        """Make a loop as people write it: tuned in bf16 and channels-last, or in torch's default settings."""
        paired, _, batches = make_pair(self.pair, self.dataset, self.device)
        layout, dtype = torch.channels_last if tuned else torch.contiguous_format, torch.float32
        if double:
            layout, dtype = torch.contiguous_format, torch.float64
        for network in (paired.teacher, paired.student):
            network.to(dtype).to(memory_format=layout)
        batches = [
            dataclasses.replace(
                batch,
                images=batch.pixels.to(dtype).contiguous(memory_format=layout),
                labels=batch.labels.to(self.device),
            )
            for batch in batches
        ]
        paired.teacher.eval()
        given = {OrdinaryBlockwise: [paired], PlainTraining: [paired.student]}
        networks = given.get(kind, [paired.teacher, paired.student])
        return kind(*networks, batches, bf16=tuned and not double, **options)

    def ours(
        self,
        method: str,
        capture: str,
        tier: str | None = None,
        codec: str = "fp32",
        *,
        exact: bool = False,
        fold: str = "auto",
    ) -> Arm:
        """Make a stage of the engine, in bf16 or exact: decomposed for stablekd, end to end for kd; fed by the live
        teacher, or by rows that are kept in a memory."""
        paired, source, batches = make_pair(self.pair, self.dataset, self.device)
        paired.precision, paired.fuses_norms = Precision("fp32" if exact else "bf16"), pick_fusion("auto", self.device)
        paired = serve(paired, batches[0].pixels.to(self.device), "off" if exact else fold)
        teacher = Relay(paired, LiveTeacher(paired, capture, fall_back=False))
        if tier is not None:
            teacher = cached(paired, source, batches, Path(), codec, tier=tier, device=self.device)
        groups = [list(range(len(paired)))] if method == "kd" else None
        return FedAhead(
            paired, teacher, batches, capture, groups=groups, objectives=objectives_of(DistillConfig(method=method)),
            optimizer=Optimizer("sgd"),
        )  # fmt: skip

    def loops(self, compiled: bool) -> dict[str, tuple[Loop, Loop]]:
        """Give rivals, and beside each a loop that computes its losses in float64."""
        kd, plain = self.rival(OrdinaryKD, double=True), self.rival(PlainTraining, double=True)
        found = {
            "KD loop": (self.rival(OrdinaryKD, tuned=False), kd),
            "KD loop, bf16": (self.rival(OrdinaryKD), kd),
            "student without a teacher, bf16": (self.rival(PlainTraining), plain),
            "blockwise, prefix run again, bf16": (
                self.rival(OrdinaryBlockwise), self.rival(OrdinaryBlockwise, double=True),
            ),
        }  # fmt: skip
        if compiled:
            found["KD loop, bf16, compiled"] = (self.rival(OrdinaryKD, compiled=True), kd)
        if self.device.type == "cuda":
            found["KD loop, bf16, CUDA graph"] = (GraphedLoop(self.rival(OrdinaryKD)), kd)
            graph = GraphedLoop(self.rival(PlainTraining))
            found["student without a teacher, bf16, CUDA graph"] = (graph, plain)
        return found

    def arms(self) -> dict[str, Arm]:
        return {
            "ours, kd": self.ours("kd", self.captured),
            "ours, relay, eager": self.ours("stablekd", "eager"),
            "ours, relay": self.ours("stablekd", self.captured),
            "ours, relay, teacher not folded": self.ours("stablekd", self.captured, fold="off"),
            "ours, cache on the device": self.ours("stablekd", self.captured, "device"),
            "ours, cache in main memory": self.ours("stablekd", self.captured, "host"),
            "ours, cache in main memory, int8": self.ours("stablekd", self.captured, "host", "int8"),
        }


def device_case(pair: Pair, dataset: Dataset, device: torch.device, compiled: bool) -> Case:
    """All contenders of one pair on a device; ours are checked against their own eager steps in float32."""
    contest, contenders = DeviceContest(pair, dataset, device), []
    loops = contest.loops(compiled)
    for name, (loop, double) in loops.items():
        precision = "bf16" if "bf16" in name else "fp32"
        flops = None if isinstance(loop, GraphedLoop) else count_flops(loop.train)
        contenders.append(_contender(name, loop.train, partial(_losses_of, double, loop), precision, flops, "rival"))
    for name, arm in contest.arms().items():
        exact = contest.ours("kd" if name == "ours, kd" else "stablekd", "eager", exact=True)
        contenders.append(_contender(name, arm.losses, partial(_losses_of, exact, arm), "bf16", None, "ours"))
    reference = loops["KD loop"][1].train
    return Case(
        "step", f"{pair.name} on {device}", contenders, "KD loop, bf16", reference, TOLERANCES["bf16"],
        {"images": pair.batch},
    )  # fmt: skip


def _contender(name: str, call: Losses, expected: Losses, precision: str, flops: int | None, role: Role) -> Contender:
    return Contender(name, call, expected=expected, tolerance=TOLERANCES[precision], role=role, flops=flops)


def _losses_of(exact: Loop | Arm, other: Loop | Arm) -> list[Tensor]:
    """Return what the other's next step should give."""
    exact.turn = other.turn
    return exact.train() if isinstance(exact, Loop) else exact.losses()


def run_device_steps(
    images: Images, device: torch.device, rounds: int, compiled: bool, show: Callable[[list[dict]], None]
) -> Measured:
    """Measure steps on a GPU, in this process, interleaved."""
    measured = Measured()
    with pinned() as measured.settings:
        for pair, dataset in images.of_pairs():
            if pair is LARGE:
                pair = dataclasses.replace(pair, batch=LARGE_BATCH)
            case = device_case(pair, dataset, device, compiled)
            measured.take(partial(measure, case, rounds, device=str(device)), show)
    return measured
