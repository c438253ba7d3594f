"""What a run is made of: everything that is decided before its first step, and that no step changes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from stablekd_fast.blocks import PairedBlocks
from stablekd_fast.cache.columns import Plan
from stablekd_fast.data import EvalSource, StreamSource, TrainSource
from stablekd_fast.distributed import Layout, Ranks
from stablekd_fast.engine.schedule import PlannedStage
from stablekd_fast.engine.synthesised import SynthesisedImages
from stablekd_fast.objectives import Objectives
from stablekd_fast.teacher.live import Teacher


@dataclass(frozen=True)
class Execution:
    """How every step of the run computes."""

    capture: str = "eager"
    """The mode in which steps run, as `pick_capture` gave it."""
    fall_back: bool = True
    """Whether steps that cannot be captured run eagerly."""
    image_dtype: torch.dtype = torch.float32
    """The type of the images that steps read, as `pick_image_dtype` gave it."""
    ema: float | None = None
    """The decay of the student's moving average; None for no average."""
    micro_batches: int = 1
    """Into how many parts a batch is divided, whose gradients add up."""
    sync_norms: bool = False
    """Whether batch norms take their statistics over the images of all ranks."""


@dataclass(frozen=True)
class Intervals:
    """How many steps lie between two evaluations (0: there are none), two checkpoints, two readings of the losses."""

    evaluate: int
    checkpoint: int
    log: int


@dataclass(frozen=True)
class Parts:
    """The parts of one run. As a context, they let go of the cache's files at its end, whatever that is."""

    paired: PairedBlocks
    teacher: Teacher
    """Serves the teacher's outputs; on several ranks a stage may use a part of the teacher instead."""
    plan: Plan
    """What is kept of the teacher; a resumed run goes on with it."""
    objectives: Objectives
    stages: list[PlannedStage]
    source: TrainSource
    """Named views, for what is measured on training images."""
    stream: TrainSource | StreamSource
    """What training takes its batches from: `source`, unless another is asked for."""
    validation: EvalSource | None
    device: torch.device
    ranks: Ranks
    layouts: list[Layout]
    """How the ranks divide each stage; empty for a process alone."""
    execution: Execution
    intervals: Intervals
    bn_batches: int
    """Batches over which batch-norm statistics are estimated for evaluation and export."""
    checkpoint: Path
    identity: dict
    """The settings and facts that decide the run's numbers; a resumed run must share them."""
    synthesised: SynthesisedImages | None = None
    """Makes the training images between steps, where they are not read; `source` shows them."""

    def __enter__(self) -> Parts:
        return self

    def __exit__(self, *_) -> None:
        self.teacher.close()
        self.source.close()

    def layout(self, stage: int) -> Layout:
        """The layout of a stage by its number."""
        return self.layouts[stage] if self.layouts else Layout(places=(0,) * len(self.stages[stage].stage.groups))
