"""`stablekd bench step`: images per second of whole training steps, ours in every mode against the usual loops; what the
engine costs beside the networks' own operations; where the time of a step goes.

Every contender trains with a learning rate of zero, so that its losses can be checked against float64 at any time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from stablekd_fast.bench.core import Case, Contender, pinned
from stablekd_fast.bench.teacher import Arm, Images, Pair, cached, make_pair, scratch, timed
from stablekd_fast.blocks import PairedBlocks
from stablekd_fast.data import Batch, Dataset
from stablekd_fast.emulator import Operation, Recorder
from stablekd_fast.errors import StableKDError
from stablekd_fast.precision import Precision, cpu_has_bf16
from stablekd_fast.step import GroupStep, Objectives, load_batch
from stablekd_fast.teacher import Relay, Teacher

TEMPERATURE = 4.0
TOLERANCE = 1e-4
"""Of losses in float32, compiled or not; bf16 has its own."""
BF16_TOLERANCE = 5e-2
EPOCH = 50_000
"""Images, for the statement when compiling has paid for itself."""


class Loop:
    """A training loop over a few batches, as people write it."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches, self.turn = batches, 0

    def train(self) -> list[Tensor]:
        self.turn = (self.turn + 1) % len(self.batches)
        return self.step(self.batches[self.turn])

    def step(self, batch: Batch) -> list[Tensor]:
        """Train on a batch; its losses."""
        raise NotImplementedError


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.0, momentum=0.9, weight_decay=5e-4)


def kd_loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    log_q, p = torch.log_softmax(student / TEMPERATURE, 1), torch.softmax(teacher / TEMPERATURE, 1)
    divergence = nn.functional.kl_div(log_q, p, reduction="batchmean")
    return nn.functional.cross_entropy(student, labels) + TEMPERATURE**2 * divergence


class OrdinaryKD(Loop):
    """The teacher's whole forward pass, the student's forward and backward pass, end to end."""

    def __init__(self, teacher: nn.Module, student: nn.Module, batches: list[Batch], *, bf16: bool = False) -> None:
        super().__init__(batches)
        self.teacher, self.student, self.optimizer = teacher.eval(), student.train(), sgd(student)
        self.bf16 = bf16

    def step(self, batch: Batch) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            with torch.no_grad():
                target = self.teacher(batch.images)
            output = self.student(batch.images)
        loss = kd_loss(output.float(), target.float(), batch.labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return [loss.detach()]


class TorchdistillKD(Loop):
    """torchdistill's distillation box with its KD loss, fed with batches as its training scripts feed it."""

    def __init__(self, teacher: nn.Module, student: nn.Module, batches: list[Batch]) -> None:
        super().__init__(batches)
        from torchdistill.core.distillation import DistillationBox

        class Box(DistillationBox):
            def setup_data_loaders(self, train_config: dict) -> None:
                """The batches are here already."""

        module = {"student_module_path": ".", "student_module_io": "output", "teacher_module_path": ".", "teacher_module_io": "output"}
        kd = {"key": "KDLoss", "kwargs": {**module, "temperature": TEMPERATURE, "alpha": 1.0, "beta": 1.0}}
        settings = {
            "num_epochs": 1,
            "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False, "sequential": []},
            "student": {"forward_proc": "forward_batch_only", "requires_grad": True, "sequential": []},
            "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"kd": {"criterion": kd, "weight": 1.0}}}},
            "optimizer": {"key": "SGD", "kwargs": {"lr": 0.0, "momentum": 0.9, "weight_decay": 5e-4}},
        }
        self.box = Box(teacher.eval(), student, {}, settings, torch.device("cpu"), None, False, 1)
        self.box.student_model.train()
        self.box.teacher_model.eval()

    def step(self, batch: Batch) -> list[Tensor]:
        loss = self.box.forward_process(batch.images, batch.labels, {})
        self.box.post_forward_process(loss)
        return [loss.detach()]


class OrdinaryBlockwise(Loop):
    """Each block alone: the teacher runs from the images to the block's target, and autograd through a squared error."""

    def __init__(self, paired: PairedBlocks, batches: list[Batch]) -> None:
        super().__init__(batches)
        self.paired = paired
        nn.ModuleList(paired.student_blocks).train()
        self.optimizers = [sgd(block) for block in paired.student_blocks]

    def step(self, batch: Batch) -> list[Tensor]:
        losses, last = [], len(self.paired.cuts)
        for k, (block, optimizer) in enumerate(zip(self.paired.student_blocks, self.optimizers)):
            known = self.paired.teacher_outputs(batch.images, {k - 1, k} - {-1})
            output = block(batch.images if k == 0 else known[k - 1])
            loss = kd_loss(output, known[k], batch.labels) if k == last else nn.functional.mse_loss(output, known[k])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return losses


class Expected:
    """The losses of contenders in float64, one batch at a time."""

    def __init__(self, pair: Pair, dataset: Dataset) -> None:
        paired, _, batches = make_pair(pair, dataset)
        paired.teacher.double(), paired.student.double()
        self.batches = [dataclasses.replace(batch, images=batch.images.double()) for batch in batches]
        self.kd = OrdinaryKD(paired.teacher, paired.student, self.batches)
        self.blockwise = OrdinaryBlockwise(paired, self.batches)
        self.ours = Arm(paired, Relay(paired), self.batches)
        paired.teacher.eval()

    def of(self, contender: Loop | Arm) -> Callable[[], list[Tensor]]:
        """What the contender's next step should give."""
        reference, step = self.kd, self.kd.train
        if isinstance(contender, Arm):
            reference, step = self.ours, self.ours.losses
        elif isinstance(contender, OrdinaryBlockwise):
            reference, step = self.blockwise, self.blockwise.train

        def expected() -> list[Tensor]:
            reference.turn = contender.turn
            return step()

        return expected


class Contest:
    """The networks of one pair, made anew for each contender."""

    def __init__(self, pair: Pair, dataset: Dataset, folder: Path) -> None:
        self.pair, self.dataset, self.kept = pair, dataset, Path(folder) / str(pair.size)

    def rival(self, kind: type[Loop], *, channels_last: bool = False, **options) -> Loop:
        """A loop as people write it, in the layout that torch has by default or in ours."""
        layout = torch.channels_last if channels_last else torch.contiguous_format
        paired, _, batches = make_pair(self.pair, self.dataset)
        paired.teacher.to(memory_format=layout), paired.student.to(memory_format=layout)
        batches = [dataclasses.replace(b, images=b.images.contiguous(memory_format=layout)) for b in batches]
        networks = [paired] if kind is OrdinaryBlockwise else [paired.teacher, paired.student]
        return kind(*networks, batches, **options)

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
        }
        if cpu_has_bf16():
            found["KD loop, channels-last, bf16"] = self.rival(OrdinaryKD, channels_last=True, bf16=True)
        return found

    def arms(self, compiled: bool) -> dict[str, Arm]:
        found = {
            "ours, relay": self.ours(relay=True),
            "ours, cache": self.ours(),
            "ours, cache, emulated": self.ours("emulate"),
            "ours, cache, norms apart": self.ours(fused=False),
        }
        for precision in ("fp32", "bf16") if cpu_has_bf16() else ("fp32",):
            name = "ours, cache" if precision == "fp32" else f"ours, cache, {precision}"
            found.setdefault(name, self.ours(precision=precision))
            if compiled:
                found[f"{name}, compiled"] = self.ours("compile", precision=precision)
        return found


def step_case(pair: Pair, dataset: Dataset, folder: Path, compiled: bool) -> tuple[Case, dict[str, Arm]]:
    """All contenders of one pair, and our arms by name."""
    expected, contest, contenders = Expected(pair, dataset), Contest(pair, dataset, folder), []
    arms = contest.arms(compiled)
    for name, loop in contest.loops().items():
        contenders.append(Contender(name, loop.train, expected=expected.of(loop), tolerance=_tolerance(name)))
    for name, arm in arms.items():
        right = partial(_eager_losses, contest.ours(), arm) if "emulated" in name else expected.of(arm)
        contenders.append(Contender(name, arm.losses, expected=right, tolerance=_tolerance(name)))
    alone = Operations(contest.ours())
    contenders.append(Contender("ours, operations alone", alone.run, expected=expected.of(alone.arm)))
    return Case("step", pair.name, contenders, "KD loop", expected.kd.train, TOLERANCE, {"images": pair.batch}), arms


def _tolerance(name: str) -> float:
    return 0.0 if "emulated" in name else BF16_TOLERANCE if "bf16" in name else TOLERANCE


def _eager_losses(eager: Arm, other: Arm) -> list[Tensor]:
    """The bits that the other arm's next step should give."""
    eager.turn = other.turn
    return eager.losses()


class Operations:
    """The convolutions, norms, activations and losses of one step of all groups, called back to back: no Python of the
    engine, no autograd, no update, no batch."""

    def __init__(self, arm: Arm) -> None:
        self.arm = arm
        arm.turn = -1
        arm.train()
        recorder = Recorder()
        with recorder:
            for step in arm.steps:
                outputs, gradients, _ = step.forward()
                step.backward(outputs, gradients)
                step.optimizer.zero_grad(set_to_none=True)
        self.calls = [operation for operation in recorder.operations if _computes(operation)]
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
    """Neither a view, nor a copy, nor memory without contents."""
    if operation.function.is_view or any(word in str(operation.function) for word in ("empty", "copy")):
        return False
    inputs = {tensor.untyped_storage().data_ptr() for tensor in operation.inputs}
    fresh = any(tensor.untyped_storage().data_ptr() not in inputs for tensor in operation.outputs)
    return fresh or operation.function._schema.is_mutable


def compile_cost(arms: dict[str, Arm], rows: list[dict]) -> list[dict]:
    """For each compiled arm the seconds of a first step, compiling included, and the epoch in which they are made up."""
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
    """A step of ours (eager, from the cache) beside its operations alone."""
    by_name = {row["contender"]: row for row in rows}
    step, alone = by_name["ours, cache"], by_name["ours, operations alone"]
    return {
        "case": step["case"],
        "step_ms": 1e3 * step["median_seconds"],
        "operations_ms": 1e3 * alone["median_seconds"],
        "step_over_operations": alone["ratio"] / step["ratio"],
    }


def run_step(
    folder: Path, images: Images, rounds: int, compiled: bool, show: Callable[[list[dict]], None]
) -> tuple[dict, dict]:
    """Rows with images/s, the engine's overhead, the cost of compiling; and the settings. Leaves nothing in `folder`.

    Raises StableKDError if torchdistill is not installed.
    """
    try:
        import torchdistill  # noqa: F401
    except ImportError as error:
        raise StableKDError(
            f"torchdistill, a rival in this bench, cannot be imported ({error}); pip install 'stablekd_fast[bench]'."
        ) from error
    found = {"rows": [], "overhead": [], "compiling": []}
    with scratch(folder) as own, pinned() as pins:
        for pair, dataset in images.of_pairs():
            case, arms = step_case(pair, dataset, own, compiled)
            rows = timed(case, rounds)
            show(rows)
            found["rows"] += rows
            found["overhead"].append(overhead(rows))
            found["compiling"] += compile_cost(arms, rows)
    return found, {"rounds": rounds, **pins}


# Where the time of a step goes.


class Phases:
    """Seconds by block and phase; each is waited for on its device, and named in a trace."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, defaultdict(float)

    @contextlib.contextmanager
    def timed(self, block: str, phase: str) -> Iterator[None]:
        self._wait()
        start = time.perf_counter()
        with torch.profiler.record_function(f"{phase}, block {block}" if block else phase):
            yield
            self._wait()
        self.seconds[block, phase] += time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def profile_steps(folder: Path, images: Images, trace: Path | None) -> dict[str, list[dict]]:
    """Rows by pair, as `profile_step` gives them. Leaves nothing in `folder`."""
    with scratch(folder) as own, pinned():
        return {pair.name: profile_step(pair, dataset, own, trace) for pair, dataset in images.of_pairs()}


def profile_step(pair: Pair, dataset: Dataset, folder: Path, trace: Path | None, steps: int = 10) -> list[dict]:
    """Milliseconds per step of each block (means over `steps` decomposed steps from a cache) by forward, loss, backward and
    update, and of copying the batch in. `trace`: a file for a Chrome trace of one more step."""
    paired, source, batches = make_pair(pair, dataset)
    arm = Arm(paired, cached(paired, source, batches, folder / "profile", "fp32"), batches)
    phases = Phases(arm.inputs.device)
    for step in arm.steps:
        step.objectives = _timed_objectives(step.objectives, phases, step.name)
    for _ in range(2):
        _profiled(arm, phases)
    phases.seconds.clear()
    for _ in range(steps):
        _profiled(arm, phases)
    rows = [_profile_row(step.name, phases, steps) for step in arm.steps]
    copy = {"block": "all", **dict.fromkeys(("forward", "loss", "backward", "update")), "copy": 1e3 * phases.seconds["", "copy"] / steps}
    if trace is not None:
        with torch.profiler.profile() as profiler:
            _profiled(arm, phases)
        profiler.export_chrome_trace(str(trace))
    return [*rows, copy]


def _profiled(arm: Arm, phases: Phases) -> None:
    arm.turn = (arm.turn + 1) % len(arm.batches)
    with phases.timed("", "copy"):
        load_batch(arm.inputs, arm.teacher, arm.wanted, arm.batches[arm.turn])
    for step in arm.steps:
        _profiled_group(step, phases)


def _profiled_group(step: GroupStep, phases: Phases) -> None:
    with phases.timed(step.name, "forward"):
        outputs, gradients, losses = step.forward()
    with phases.timed(step.name, "backward"):
        step.backward(outputs, gradients)
    with phases.timed(step.name, "update"):
        step.take_rates()
        step.update()
        step.note(torch.stack(losses).sum())


def _timed_objectives(objectives: Objectives, phases: Phases, block: str) -> Objectives:
    def timed(function: Callable) -> Callable:
        def call(*tensors):
            with phases.timed(block, "loss"):
                return function(*tensors)

        return call

    return dataclasses.replace(objectives, feature=timed(objectives.feature), logits=timed(objectives.logits))


def _profile_row(block: str, phases: Phases, steps: int) -> dict:
    milliseconds = {phase: 1e3 * phases.seconds[block, phase] / steps for phase in ("forward", "loss", "backward", "update")}
    milliseconds["forward"] -= milliseconds["loss"]  # the loss is computed within
    return {"block": block, **milliseconds, "copy": None}
