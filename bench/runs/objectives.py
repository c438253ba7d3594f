"""`stablekd bench objectives`: what the losses of a method add to a step, beside the student's own pass.

All that the teacher gives lies in the step's inputs already, as rows of a cache do. The base is a step that learns from
labels alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import torch

from stablekd_fast.bench.core import SEED, Case, Contender, Measured, measure_cases, pinned
from stablekd_fast.bench.runs.teacher import CPU, SMALL, Arm, Pair, make_pair
from stablekd_fast.blocks import pair_reused, pick_fusion
from stablekd_fast.config import DistillConfig, objectives_of
from stablekd_fast.data import open_dataset
from stablekd_fast.engine.schedule import Optimizer
from stablekd_fast.execution.precision import Precision
from stablekd_fast.objectives import METHODS, method_named
from stablekd_fast.run.builders import auxiliary_facts
from stablekd_fast.teacher.live import Relay

ALONE = "ce"
NEEDS_MORE = ("multi-teacher", "mekd", "fast-dfkd", "bpr", "unkd")
"""Methods that need further teachers, a teacher that is a function, images that are made, or no images."""


def methods() -> list[str]:
    """Return the methods that train end to end on given images, the base first."""
    others = [name for name, method in METHODS.items() if method.stages == "end to end" and name != ALONE]
    return [ALONE, *(name for name in others if name not in NEEDS_MORE)]


def arm_of(name: str, pair: Pair, data: str, precision: str, device: torch.device) -> Arm:
    """Make steps that train the whole student by a method, at a learning rate of zero: eager on a CPU, captured on a
    GPU."""
    paired, source, batches = make_pair(pair, open_dataset(data), device)
    if method_named(name).reuses_classifier:
        paired = pair_reused(paired.teacher, paired.student, batches[0].images)
    paired.precision = Precision(precision)
    batches = [dataclasses.replace(batch, second=batch.images) for batch in batches]
    classes = len(open_dataset(data).classes)
    objectives = objectives_of(DistillConfig(method=name))
    own = objectives.auxiliary
    twice = own is not None and own.kind.reads_input_gradient  # which fused norms cannot
    paired.fuses_norms = pick_fusion("off" if twice else "auto", device)
    facts = auxiliary_facts(paired, classes, source.split.total, pair.batch, (pair.size, pair.size), device)
    objectives = objectives.made(facts, SEED)
    groups = [list(range(len(paired)))]
    capture = "cudagraph" if device.type == "cuda" else "eager"
    return Arm(
        paired, Relay(paired), batches, capture, groups=groups, objectives=objectives, optimizer=Optimizer("sgd")
    )


def run_objectives(
    data: str,
    precision: str,
    rounds: int,
    show: Callable[[list[dict]], None],
    pair: Pair = SMALL,
    device: torch.device = CPU,
) -> Measured:
    """Measure a step of each method, resnet56 -> resnet20 at batch 128."""
    with pinned() as pins:
        arms = {name: arm_of(name, pair, data, precision, device) for name in methods()}
        contenders = [
            Contender(name, arm.students, expected=partial(arm.expected, 0), role="rival" if name == ALONE else "ours")
            for name, arm in arms.items()
        ]
        title = f"{pair.name}, {precision}, {device.type}"
        case = Case("objectives", title, contenders, ALONE, contenders[0].expected, 1e-5, {"images": pair.batch})
        measured = measure_cases([case], rounds, show, device=str(device))
    measured.settings = pins
    return measured
