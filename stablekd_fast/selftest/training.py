"""Claims on a small pair in training: captured as eagerly, on the device as on the CPU, and without waiting."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from stablekd_fast.blocks import PairedBlocks, pair_blocks, pick_fusion
from stablekd_fast.data import Batch
from stablekd_fast.engine.schedule import Optimizer, PlannedStage, Stage
from stablekd_fast.engine.stage import StageSteps, stage_steps
from stablekd_fast.engine.step import Rates
from stablekd_fast.errors import CaptureError
from stablekd_fast.execution.capture import make_runner
from stablekd_fast.execution.memory import placed
from stablekd_fast.execution.moments import Clock
from stablekd_fast.execution.precision import FP32, Precision
from stablekd_fast.execution.process import deterministic
from stablekd_fast.objectives import Objectives, objective
from stablekd_fast.selftest.claim import Broken, Claim, NotHere, difference
from stablekd_fast.teacher.live import Relay

CPU_TO_DEVICE = 0.02
"""How far the first losses may be from the CPU's."""
_STEPS = 6
_GROUPS = ([[0], [1], [2]], [[0, 1, 2]])
_CYCLED = {"cycle": "triangular", "momentum_low": 0.7}
_OPTIMIZERS = {
    "AdamW": Optimizer("adamw", lr=0.01, clip=1.0),
    "SGD": Optimizer("sgd", lr=0.02, nesterov=True, **_CYCLED),
}


def _net(depth: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    parts = []
    for inside, width in ((3, 8), (8, 16)):
        layers = []
        for number in range(depth):
            first = number == 0
            convolution = nn.Conv2d(inside if first else width, width, 3, 2 if first else 1, 1, bias=False)
            layers += [convolution, nn.BatchNorm2d(width), nn.ReLU()]
        parts.append(nn.Sequential(*layers))
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def _batch(number: int) -> Batch:
    made = torch.Generator().manual_seed(number)
    images = torch.randn(8, 3, 8, 8, generator=made).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (8,), generator=made)
    return Batch(torch.arange(8), 0, images, labels)


class _Trial:
    """A small pair in training: decomposed blocks first, then the whole student."""

    def __init__(self, device: torch.device, optimizer: Optimizer, precision: Precision) -> None:
        teacher, student = (placed(_net(depth, seed), device) for depth, seed in ((2, 1), (1, 2)))
        images = _batch(0).images
        assert images is not None
        self.paired: PairedBlocks = pair_blocks(teacher.eval(), student, images.to(device), ["0", "1"])
        self.paired.precision, self.paired.fuses_norms = precision, pick_fusion("auto", device)
        self.device, self.optimizer = device, optimizer
        self.aims = Objectives(objective("feature", "mse"), objective("logits", "kd"), "all")

    def enter(self, groups: list[list[int]]) -> StageSteps:
        """Return the steps of a stage, with the first batch loaded."""
        planned = PlannedStage(Stage(groups, steps=_STEPS, optimizer=self.optimizer), 0, _STEPS)
        rates = Rates.of_stage(planned, None, self.device)
        nn.ModuleList(self.paired.student_blocks).train()
        steps = stage_steps(self.paired, groups, self.aims, self.optimizer, rates=rates, history=_STEPS)
        self.load(steps, 0)
        return steps

    def load(self, steps: StageSteps, number: int) -> None:
        steps.load(Relay(self.paired), _batch(number))

    def train(self, mode: str) -> list[Tensor]:
        """Train; return weights, statistics, moments, rates and losses at the end of each stage."""
        seen = []
        for groups in _GROUPS:
            steps = self.enter(groups)
            with contextlib.closing(steps.runner(mode)) as runner:
                for number in range(_STEPS):
                    self.load(steps, number)
                    runner.run()
                seen += [tensor.detach().clone() for tensor in steps.state()]
        return seen


def _captured(device: torch.device) -> str:
    return "cudagraph" if device.type == "cuda" else "emulate"


def _replays(optimizer: str, precision: Precision) -> Callable[[torch.device], str]:
    def check(device: torch.device) -> str:
        with deterministic(device):
            sides = [
                _Trial(device, _OPTIMIZERS[optimizer], precision).train(mode) for mode in ("eager", _captured(device))
            ]
        pairs = list(zip(*sides, strict=True))
        if not all(torch.equal(a, b) for a, b in pairs):
            raise Broken(f"{_captured(device)} differs from eager steps by up to {difference(pairs):.2g}")
        return f"{_captured(device)}: {len(pairs)} tensors after {_STEPS * len(_GROUPS)} steps"

    return check


def _never_waits(device: torch.device) -> str:
    if device.type != "cuda":
        raise NotHere("only a GPU can be waited for; needs a CUDA device")
    steps = _Trial(device, _OPTIMIZERS["AdamW"], Precision("bf16")).enter(_GROUPS[0])
    for mode in ("eager", "cudagraph"):
        with contextlib.closing(steps.runner(mode)) as runner:
            runner.run()  # kernels are compiled and handles made at the first
            torch.cuda.set_sync_debug_mode("error")
            try:
                runner.run()
            finally:
                torch.cuda.set_sync_debug_mode("default")
    return "eager and captured steps"


def _first_losses(device: torch.device) -> list[float]:
    steps = _Trial(device, _OPTIMIZERS["SGD"], FP32).enter(_GROUPS[0])
    steps.run()
    return [step.losses[-1].item() for step in steps.steps]


def _agrees_with_cpu(device: torch.device) -> str:
    if device.type == "cpu":
        raise NotHere("the device is the CPU itself; needs a CUDA device")
    pairs = list(zip(_first_losses(device), _first_losses(torch.device("cpu"))))
    apart = max(abs(mine - truth) / truth for mine, truth in pairs)
    if not apart <= CPU_TO_DEVICE:
        raise Broken(f"losses differ by {apart:.1%} from the CPU's; at most {CPU_TO_DEVICE:.0%} is allowed")
    return f"{apart:.2g} apart"


def _a_failed_capture(device: torch.device) -> str:
    """Break ten captures by what no graph can hold, then train in a good one."""
    if device.type != "cuda":
        raise NotHere("only a GPU captures; needs a CUDA device")
    weight, trial = torch.ones(1 << 22, device=device), _Trial(device, _OPTIMIZERS["AdamW"], FP32)
    steps, stream, held = trial.enter(_GROUPS[0]), torch.cuda.current_stream(device), []
    for number in range(_FAILED):
        _fail_to_capture(weight, number % 2 == 1)
        torch.cuda.empty_cache()
        held.append(torch.cuda.memory_reserved(device))
    left = held[-1] - held[1]  # what libraries keep for good is there after the first of either kind
    if left > _SEGMENT or torch.cuda.current_stream(device) != stream:
        raise Broken(f"failed captures have left {left} bytes that nobody can use, or another stream current")
    with contextlib.closing(steps.runner("cudagraph")) as runner:
        runner.run()
    losses = [step.losses[-1].item() for step in steps.steps]
    if not all(math.isfinite(loss) for loss in losses):
        raise Broken(f"the step captured after them gave the losses {losses}")
    return f"{_FAILED} failed, no memory lost, then one trained"


def _fail_to_capture(weight: Tensor, waits: bool) -> None:
    """Try to capture a step that waits for the device, which breaks the capture, or reads a value, which is refused."""

    def body() -> None:
        doubled = weight * 2
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize(weight.device) if waits else doubled.sum().item()

    try:
        make_runner("cudagraph", [body], [weight], weight.device, fall_back=False)
    except CaptureError:
        return
    raise Broken("a step that waits for the device was captured")


def _device_times(device: torch.device) -> str:
    """Time work that the host hands out at once and the device takes long for."""
    if device.type != "cuda":
        raise NotHere("on a CPU the host's time is the device's; needs a CUDA device")
    clock, start = Clock(device), time.perf_counter()
    with clock.timing("work"):
        torch.cuda._sleep(_SLEEP_CYCLES)
    handed_out = time.perf_counter() - start
    seconds = clock.collect(wait=True)["work"]
    taken = time.perf_counter() - start
    if not handed_out < seconds <= taken * 1.05:
        raise Broken(f"{1e3 * seconds:.1f} ms were shown for work that was over after {1e3 * taken:.1f} ms")
    return f"{1e3 * seconds:.1f} ms of work, handed out in {1e3 * handed_out:.2f} ms"


_FAILED, _SLEEP_CYCLES = 10, 50_000_000
_SEGMENT = 2 << 20
"""The smallest piece that the allocator takes from the device."""

TRAINING = [
    *(
        Claim(
            f"captured steps give the bits of eager ones: {optimizer}, {precision.name}",
            _replays(optimizer, precision),
            "12 steps in two stages, with every weight, moment, rate and loss",
        )
        for optimizer in _OPTIMIZERS
        for precision in (FP32, Precision("bf16"))
    ),
    Claim("a step never waits for the device", _never_waits, "torch's own check of waiting"),
    Claim("first losses agree with the CPU's", _agrees_with_cpu, "the same weights and batch on the CPU"),
    Claim("failed captures leave nothing behind", _a_failed_capture, "memory, stream, and a good capture after them"),
    Claim("times are the device's own", _device_times, "events against the host's clock"),
]
