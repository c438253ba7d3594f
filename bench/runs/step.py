"""`stablekd bench step`: images per second of whole training steps, ours in every mode against the usual loops.

It also shows what the engine costs beside the networks' own operations, and what compiling costs. Limits are the
machine's arithmetic, and the step's own convolutions with all else at the speed of memory; a rival on easier terms is
the student that trains without a teacher.

Every contender trains with a learning rate of zero, so that its losses can be checked against float64 at any time.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from stablekd_fast.bench.core import Case, Contender, Measured, Role, measure, pinned, scratch
from stablekd_fast.bench.peak import count_flops, peak, peak_contenders
from stablekd_fast.bench.runs.loops import Loop, OrdinaryBlockwise, OrdinaryKD, PlainTraining, TorchdistillKD
from stablekd_fast.bench.runs.teacher import Arm, Images, Pair, cached, make_pair
from stablekd_fast.bench.runs.unavoidable import unavoidable
from stablekd_fast.data import Dataset
from stablekd_fast.errors import StableKDError
from stablekd_fast.execution.emulator import Operation, Recording
from stablekd_fast.execution.precision import Precision, cpu_has_bf16
from stablekd_fast.teacher.live import Relay

TOLERANCE = 1e-4
"""The largest error of losses in float32, compiled or not."""
BF16_TOLERANCE = 5e-2
"""The largest error of losses in bf16."""
ALONE = "student without a teacher"
OVERHEAD = "the engine beside the operations of its networks and losses"
EPOCH = 50_000
"""The images of the epochs after which compiling is said to have paid for itself."""


class Expected:
    """Knows the losses of contenders in float64, one batch at a time."""

    def __init__(self, pair: Pair, dataset: Dataset) -> None:
        paired, _, batches = make_pair(pair, dataset)
        paired.teacher.double(), paired.student.double()
        self.batches = [dataclasses.replace(batch, images=batch.images.double()) for batch in batches]
        self.kd = OrdinaryKD(paired.teacher, paired.student, self.batches)
        self.plain = PlainTraining(paired.student, self.batches)
        self.blockwise = OrdinaryBlockwise(paired, self.batches)
        self.ours = Arm(paired, Relay(paired), self.batches)
        paired.teacher.eval()

    def of(self, contender: Loop | Arm) -> Callable[[], list[Tensor]]:
        """Return what the contender's next step should give."""
        reference, step = self.kd, self.kd.train
        if isinstance(contender, Arm):
            reference, step = self.ours, self.ours.losses
        elif isinstance(contender, OrdinaryBlockwise):
            reference, step = self.blockwise, self.blockwise.train
        elif isinstance(contender, PlainTraining):
            reference, step = self.plain, self.plain.train

        def expected() -> list[Tensor]:
            reference.turn = contender.turn
            return step()

        return expected


class Contest:
    """Makes the networks of one pair anew for each contender."""

    def __init__(self, pair: Pair, dataset: Dataset, folder: Path) -> None:
        self.pair, self.dataset, self.kept = pair, dataset, Path(folder) / str(pair.size)

    def rival(self, kind: type[Loop], *, channels_last: bool = False, **options) -> Loop:
        """Make a loop as people write it, in the layout that torch has by default or in ours."""
        layout = torch.channels_last if channels_last else torch.contiguous_format
        paired, _, batches = make_pair(self.pair, self.dataset)
        paired.teacher.to(memory_format=layout), paired.student.to(memory_format=layout)
        batches = [dataclasses.replace(b, images=b.images.contiguous(memory_format=layout)) for b in batches]
        given = {OrdinaryBlockwise: [paired], PlainTraining: [paired.student]}
        return kind(*given.get(kind, [paired.teacher, paired.student]), batches, **options)

    def ours(self, capture: str = "eager", *, relay: bool = False, precision: str = "fp32", fused: bool = True) -> Arm:
        paired, source, batches = make_pair(self.pair, self.dataset)
        paired.precision, paired.fuses_norms = Precision(precision), fused
        teacher = Relay(paired) if relay else cached(paired, source, batches, self.kept / precision, "fp32")
        return Arm(paired, teacher, batches, capture)

    def loops(self) -> dict[str, Loop]:
        found = {
            "KD loop": self.rival(OrdinaryKD),
            "KD loop, channels-last": self.rival(OrdinaryKD, channels_last=True),
            "torchdistill KD": self.rival(TorchdistillKD),
            "blockwise, prefix run again": self.rival(OrdinaryBlockwise),
            "blockwise, prefix run again, channels-last": self.rival(OrdinaryBlockwise, channels_last=True),
            ALONE: self.rival(PlainTraining),
            f"{ALONE}, channels-last": self.rival(PlainTraining, channels_last=True),
        }
        if cpu_has_bf16():
            found["KD loop, channels-last, bf16"] = self.rival(OrdinaryKD, channels_last=True, bf16=True)
            found[f"{ALONE}, channels-last, bf16"] = self.rival(PlainTraining, channels_last=True, bf16=True)
        return found

    def arms(self, compiled: bool) -> dict[str, Arm]:
        found = {
            "ours, relay": self.ours(relay=True),
            "ours, cache": self.ours(),
            "ours, cache, emulated": self.ours("emulate"),
            "ours, cache, norms apart": self.ours(fused=False),
        }
        if compiled:
            found["ours, cache, compiled"] = self.ours("compile")
        if cpu_has_bf16():
            found["ours, cache, bf16"] = self.ours(precision="bf16")
            if compiled:
                found["ours, cache, bf16, compiled"] = self.ours("compile", precision="bf16")
        return found


def step_case(pair: Pair, dataset: Dataset, folder: Path, compiled: bool) -> tuple[Case, dict[str, Arm]]:
    """All contenders of one pair and the limit of arithmetic; and our arms by name."""
    expected, contest, contenders = Expected(pair, dataset), Contest(pair, dataset, folder), []
    arms = contest.arms(compiled)
    for name, loop in contest.loops().items():
        contenders.append(_contender(name, loop.train, expected.of(loop), count_flops(loop.train)))
    flops = {name: count_flops(arms[name].losses) for name in ("ours, relay", "ours, cache")}
    for name, arm in arms.items():
        right = partial(_eager_losses, contest.ours(), arm) if "emulated" in name else expected.of(arm)
        contenders.append(_contender(name, arm.losses, right, flops.get(name, flops["ours, cache"]), "ours"))
    alone = Operations(contest.ours())
    contenders.append(
        _contender("ours, operations alone", alone.run, expected.of(alone.arm), flops["ours, cache"], "limit")
    )
    tolerances = {"fp32": TOLERANCE} | ({"bf16": BF16_TOLERANCE} if cpu_has_bf16() else {})
    for precision, tolerance in tolerances.items():
        contenders += unavoidable(Operations(contest.ours(precision=precision)).calls, precision, tolerance)
        contenders += peak_contenders(precision)
    return Case("step", pair.name, contenders, "KD loop", expected.kd.train, TOLERANCE, {"images": pair.batch}), arms


def _contender(
    name: str, call: Callable[[], list[Tensor]], expected: Callable, flops: int, role: Role = "rival"
) -> Contender:
    tolerance = 0.0 if "emulated" in name else BF16_TOLERANCE if "bf16" in name else TOLERANCE
    limit = peak(_precision(name))
    return Contender(name, call, expected=expected, tolerance=tolerance, role=role, flops=flops, limit=limit)


def _precision(name: str) -> str:
    return "bf16" if "bf16" in name else "fp32"


def _eager_losses(eager: Arm, other: Arm) -> list[Tensor]:
    """Return the bits that the other arm's next step should give."""
    eager.turn = other.turn
    return eager.losses()


class Operations:
    """Calls the convolutions, norms, activations and losses of one step of all groups back to back.

    That is a step without the engine's Python, autograd, updates and loading of a batch.
    """

    def __init__(self, arm: Arm) -> None:
        self.arm = arm
        arm.turn = -1
        arm.train()
        recording = Recording()
        with recording:
            for step in arm.stage.steps:
                outputs, gradients, _ = step.forward()
                step.backward(outputs, gradients)
                step.optimizer.zero_grad(set_to_none=True)
        self.calls = [operation for operation in recording.operations if _computes(operation)]
        arm.turn = -1  # the expected losses are those of the batch that the operations were recorded with

    def run(self) -> list[Tensor]:
        losses = []
        with torch.no_grad():
            for operation in self.calls:
                result = operation.function(*operation.args, **operation.kwargs)
                if operation.function._opname.endswith("_with_grad"):
                    losses.append(result[0])
        return losses


def _computes(operation: Operation) -> bool:
    """Tell whether an operation is neither a view, nor a copy, nor memory without contents."""
    if operation.function.is_view or any(word in str(operation.function) for word in ("empty", "copy")):
        return False
    inputs = {tensor.untyped_storage().data_ptr() for tensor in operation.inputs}
    fresh = any(tensor.untyped_storage().data_ptr() not in inputs for tensor in operation.outputs)
    return fresh or operation.function._schema.is_mutable


def compile_cost(arms: dict[str, Arm], rows: list[dict]) -> list[dict]:
    """Return for each compiled arm the seconds of a first step, with compiling, and the epochs that make them up."""
    seconds, found = {row["contender"]: row["median_seconds"] for row in rows}, []
    for name, arm in arms.items():
        if "compiled" in name:
            first = _first_compiled_step(arm)
            gained = seconds[name.removesuffix(", compiled")] - seconds[name]
            epochs = first / gained / (EPOCH / rows[0]["images"]) if gained > 0 else None
            found.append({"contender": name, "first_step_seconds": first, "made_up_after_epochs": epochs})
    return found


def _first_compiled_step(arm: Arm) -> float:
    torch.compiler.reset()
    with torch._inductor.config.patch({"force_disable_caches": True}):
        start = time.perf_counter()
        arm.losses()
        return time.perf_counter() - start


def overhead(rows: list[dict]) -> dict:
    """Set a step of ours (eager, from the cache) beside its operations alone."""
    by_name = {row["contender"]: row for row in rows}
    step, alone = by_name["ours, cache"], by_name["ours, operations alone"]
    return {
        "case": step["case"],
        "step_ms": 1e3 * step["median_seconds"],
        "operations_ms": 1e3 * alone["median_seconds"],
        "step_over_operations": alone["ratio"] / step["ratio"],
    }


def run_step(folder: Path, images: Images, rounds: int, compiled: bool, show: Callable[[list[dict]], None]) -> Measured:
    """Measure steps, the engine's overhead and the cost of compiling. Leaves nothing in `folder`.

    Raises StableKDError if torchdistill is not installed.
    """
    try:
        import torchdistill  # noqa: F401
    except ImportError as error:
        raise StableKDError(
            f"torchdistill, a rival in this bench, cannot be imported ({error}); pip install 'stablekd_fast[bench]'."
        ) from error
    measured, beside, compiling = Measured(), [], []
    with scratch(folder) as own, pinned() as measured.settings:
        for pair, dataset in images.of_pairs():
            case, arms = step_case(pair, dataset, own, compiled)
            rows = measured.take(partial(measure, case, rounds), show)
            if rows:
                beside.append(overhead(rows))
                compiling += compile_cost(arms, rows)
    measured.tables = {OVERHEAD: beside, "compiling": compiling}
    return measured
