"""Times one step of any stage of any method: as people write it, and by the engine with and without a cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from stablekd_fast.bench.core import Case, Contender, Role, measure
from stablekd_fast.bench.peak import count_flops, peak, peak_contenders
from stablekd_fast.bench.runs.loops import OrdinaryStage
from stablekd_fast.bench.runs.teacher import Arm, Pair, cached, make_pair
from stablekd_fast.blocks import PairedBlocks, pick_fusion
from stablekd_fast.config import DistillConfig, objectives_of
from stablekd_fast.data import Batch, Dataset, TrainSource
from stablekd_fast.engine.schedule import Optimizer, group_name
from stablekd_fast.execution.precision import Precision, cpu_has_bf16
from stablekd_fast.teacher.live import Relay

PLAIN, TUNED, LIVE, CACHE = "plain", "plain, bf16, channels-last", "engine, live teacher", "engine, cache"

TOLERANCES = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 5e-2}


class StageBench:
    """Times stages of one pair on real images, in the engine's `precision`."""

    def __init__(self, teacher: str, student: str, dataset: Dataset, precision: str, folder: Path) -> None:
        self.names, self.dataset = (teacher, student), dataset
        self.size = dataset.augmentation.size or dataset.train.images.shape[1]
        self.precision, self.folder = precision, folder

    def seconds(self, method: str, groups: list[list[int]], batch: int, rounds: int) -> list[dict]:
        """Measure each way to run the stage, and the limits. Raises WrongResult if one computes something else."""
        return measure(self.case(method, groups, batch), rounds)

    def case(self, method: str, groups: list[list[int]], batch: int) -> Case:
        reference = self._plain(method, groups, batch, torch.float64)
        contenders = [_contender(PLAIN, self._plain(method, groups, batch, torch.float32).train, reference, "fp32")]
        if cpu_has_bf16():
            tuned = self._plain(method, groups, batch, torch.float32, bf16=True, layout=torch.channels_last)
            contenders.append(_contender(TUNED, tuned.train, reference, "bf16"))
        for name in (LIVE,) if method == "ce" else (LIVE, CACHE):
            arm = self._engine(method, groups, batch, from_cache=name == CACHE)
            contenders.append(_contender(name, arm.losses, reference, self.precision, role="ours"))
        for precision in sorted({"fp32", self.precision} | ({"bf16"} if cpu_has_bf16() else set())):
            contenders += peak_contenders(precision)
        title = f"{method}, {'|'.join(group_name(group) for group in groups)}, batch {batch}"
        return Case("end-to-end", title, contenders, PLAIN, reference.train, TOLERANCES["fp32"], {"images": batch})

    def _plain(
        self,
        method: str,
        groups: list[list[int]],
        batch: int,
        dtype: torch.dtype,
        *,
        bf16: bool = False,
        layout: torch.memory_format = torch.contiguous_format,
    ) -> OrdinaryStage:
        paired, _, batches = self._pair(method, batch)
        nn.ModuleList([paired.teacher, paired.student]).to(dtype).to(memory_format=layout)
        batches = [dataclasses.replace(b, images=b.images.to(dtype).contiguous(memory_format=layout)) for b in batches]
        return OrdinaryStage(paired, groups, objectives_of(DistillConfig(method=method)), batches, bf16=bf16)

    def _engine(self, method: str, groups: list[list[int]], batch: int, *, from_cache: bool) -> Arm:
        paired, source, batches = self._pair(method, batch)
        paired.precision = Precision(self.precision)
        paired.fuses_norms = pick_fusion("auto", torch.device("cpu"))
        teacher = Relay(paired)
        if from_cache:
            teacher = cached(paired, source, batches, self.folder / f"batch-{batch}", "fp32")
        objectives = objectives_of(DistillConfig(method=method))
        return Arm(paired, teacher, batches, groups=groups, objectives=objectives, optimizer=Optimizer())

    def _pair(self, method: str, batch: int) -> tuple[PairedBlocks, TrainSource, list[Batch]]:
        paired, source, batches = make_pair(Pair(*self.names, self.size, batch), self.dataset)
        if method == "ce":
            paired = PairedBlocks.without_teacher(paired.student)
        return paired, source, batches


def _contender(
    name: str, call: Callable[[], list[Tensor]], reference: OrdinaryStage, precision: str, *, role: Role = "rival"
) -> Contender:
    """Make a contender whose losses are to be the reference's on the batch that it takes next."""

    def expected() -> list[Tensor]:
        reference.turn = call.__self__.turn
        return reference.train()

    flops, limit = count_flops(call), peak(precision)
    return Contender(
        name, call, expected=expected, tolerance=TOLERANCES[precision], role=role, flops=flops, limit=limit
    )
