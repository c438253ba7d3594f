"""How long teacher and student take, measured on the run's own networks and images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import closing

import torch
from torch import Tensor, nn

from stablekd_fast.blocks import PairedBlocks
from stablekd_fast.blocks.modes import untouched
from stablekd_fast.data import Batch
from stablekd_fast.engine.inputs import StageInputs, load_batch
from stablekd_fast.engine.schedule import Optimizer, group_name
from stablekd_fast.engine.stage import stage_steps
from stablekd_fast.engine.step import Rates
from stablekd_fast.errors import CaptureError
from stablekd_fast.execution.capture import CAPTURED, make_runner
from stablekd_fast.execution.timing import seconds
from stablekd_fast.models.weights import restore_state
from stablekd_fast.objectives import Objectives
from stablekd_fast.teacher.live import Relay


def measure_teacher(paired: PairedBlocks, images: Tensor, capture: str = "eager") -> list[float]:
    """Seconds per batch of each teacher block, with the bridge behind it, run by a mode of `pick_capture`."""
    times, x = [], images
    with torch.no_grad(), paired.precision.applied(images.device):
        for k, block in enumerate(paired.serving_blocks):
            bridge = paired.bridge_after(k)

            def call(block=block, bridge=bridge, x=x):
                y = block(x)
                if bridge is not None:
                    bridge(y)
                return y

            times.append(_seconds(call, capture, [], images.device))
            x = block(x)
    return times


def measure_students(
    paired: PairedBlocks,
    objectives: Objectives,
    groupings: Iterable[list[list[int]]],
    batch: Batch,
    device: torch.device,
    capture: str = "eager",
) -> dict[str, float]:
    """Seconds per batch of each group's step without an auxiliary loss, by the group's name, run by a mode of
    `pick_capture`. The student is left as it was."""
    saved = {name: value.clone() for name, value in paired.student.state_dict().items()}
    modes = {module: module.training for module in paired.student.modules()}
    times: dict[str, float] = {}
    others = objectives.without_auxiliary()  # whose memory these steps would change
    with untouched(paired.student), torch.enable_grad():
        nn.ModuleList([paired.student, *paired.student_blocks]).train()
        for groups in groupings:
            inputs = StageInputs(device)
            load_batch(inputs, Relay(paired), objectives.teacher_outputs(groups, len(paired.cuts)), batch)
            for group in groups:
                if group_name(group) not in times:  # one at a time: each has an optimizer's moments
                    rates = Rates.constant(0.0, device=device)
                    stage = stage_steps(paired, [group], others, Optimizer(), rates=rates, inputs=inputs)
                    times[group_name(group)] = _seconds(stage.run, capture, stage.state(), device)
    restore_state(paired.student, saved)
    for module, mode in modes.items():
        module.training = mode
    return times


def _seconds(call: Callable[[], object], capture: str, state: Sequence[Tensor], device: torch.device) -> float:
    """Seconds of a call that changes `state`, captured where training captures; eagerly where that fails."""
    if capture not in CAPTURED:
        return seconds(call, device)
    try:
        runner = make_runner(capture, [call], state, device, fall_back=False)
    except CaptureError:
        return seconds(call, device)
    with closing(runner):
        return seconds(runner.run, device)
