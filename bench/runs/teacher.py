"""`stablekd bench teacher`: decomposed steps that the teacher feeds in several ways.

Its prefix is run again for each block, it runs once and hands on its activations, or its rows come out of the cache.
The limit is students that have their inputs already. Filling that cache is timed as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from stablekd_fast import models
from stablekd_fast.bench.core import SEED, Case, Contender, Measured, measure_cases, pinned, scratch
from stablekd_fast.blocks import PairedBlocks, pair_blocks
from stablekd_fast.cache.columns import Column, Columns, Kept, Plan
from stablekd_fast.cache.settings import CacheSettings
from stablekd_fast.cache.writer import RowWriter, store_now
from stablekd_fast.data import Batch, Dataset, TrainSource, open_dataset
from stablekd_fast.engine.inputs import output_key
from stablekd_fast.engine.schedule import Optimizer
from stablekd_fast.engine.stage import stage_steps
from stablekd_fast.engine.step import Rates
from stablekd_fast.errors import StableKDError
from stablekd_fast.execution.capture import COMPILED
from stablekd_fast.objectives import Objectives, objective
from stablekd_fast.teacher.cached import CachedTeacher
from stablekd_fast.teacher.live import Relay, Teacher

CPU = torch.device("cpu")
LOGITS = "fp32"
RERUN, ALONE = "prefix run again", "students alone"
BETWEEN, BESIDE, UNSTORED = "stored between passes", "stored beside the next pass", "teacher alone"


@dataclass(frozen=True)
class Pair:
    """Two networks at one image size. `batches` batches of `batch` images are taken in turn."""

    teacher: str
    student: str
    size: int
    batch: int
    batches: int = 4

    @property
    def name(self) -> str:
        return f"{self.teacher} -> {self.student}, {self.size} px, batch {self.batch}".replace("torchvision/", "")


SMALL = Pair("resnet56", "resnet20", 32, 128)
LARGE = Pair("torchvision/resnet34", "torchvision/resnet18", 224, 32, batches=2)


class Rerun:
    """The usual practice: for each block anew the teacher runs from the images up to that block."""

    def __init__(self, paired: PairedBlocks) -> None:
        self.paired = paired

    def outputs(self, wanted: Collection[int], images: Tensor, batch: Batch) -> dict[int, Tensor]:
        found = {}
        for k in sorted(wanted):
            found |= self.paired.teacher_outputs(images, {k - 1, k} & set(wanted))
        return found


class Arm:
    """Trains all groups of a stage, by default every block alone, fed by one kind of teacher and run in one mode.

    The learning rate is zero, so that every step has the same weights to compute with.
    """

    def __init__(
        self,
        paired: PairedBlocks,
        teacher: Teacher,
        batches: list[Batch],
        capture: str = "eager",
        *,
        groups: list[list[int]] | None = None,
        objectives: Objectives | None = None,
        optimizer: Optimizer | None = None,
    ) -> None:
        self.paired, self.teacher, self.batches, self.turn = paired, teacher, batches, 0
        self.objectives = objectives or Objectives(objective("feature", "mse"), objective("logits", "kd"), "all")
        groups, device = groups or [[k] for k in range(len(paired))], batches[0].images.device
        rates, compiled = Rates.constant(0.0, device=device), capture in COMPILED
        optimizer = optimizer or Optimizer("sgd")
        nn.ModuleList(paired.student_blocks).train()
        self.stage = stage_steps(paired, groups, self.objectives, optimizer, rates=rates, compiled=compiled)
        self.load()
        self.runner = self.stage.runner(capture)

    def load(self) -> None:
        self.stage.load(self.teacher, self.batches[self.turn])

    def train(self) -> list[Tensor]:
        """Run one step of every group; return what the teacher gave for it."""
        self.turn = (self.turn + 1) % len(self.batches)
        self.load()
        return self.students()

    def students(self) -> list[Tensor]:
        self.runner.run()
        return [self.stage.inputs[output_key(k)] for k in sorted(self.stage.wanted)]

    def expected(self, ahead: int = 1) -> list[Tensor]:
        """Return what the live teacher gives for the batch that `train` takes next, or for the one at hand."""
        batch = self.batches[(self.turn + ahead) % len(self.batches)]
        outputs = self.paired.teacher_outputs(batch.images, self.stage.wanted)
        return [outputs[k].double() for k in sorted(self.stage.wanted)]

    def losses(self) -> list[Tensor]:
        """Run one step of every group; return the losses of the groups."""
        self.train()
        return [step.losses[0].clone() for step in self.stage.steps]


def make_pair(
    pair: Pair, dataset: Dataset, device: torch.device | str = "cpu"
) -> tuple[PairedBlocks, TrainSource, list[Batch]]:
    """Make networks with random weights, and batches of real images, on a device."""
    torch.manual_seed(SEED)
    classes = len(dataset.classes)
    networks = [
        models.build(name, classes, pair.size).to(device).to(memory_format=torch.channels_last)
        for name in (pair.teacher, pair.student)
    ]
    source = TrainSource(
        dataset.train,
        dataset.augmentation,
        dataset.mean,
        dataset.std,
        batch_size=pair.batch,
        seed=SEED,
        views=1,
        workers=2,
        device=device,
    )
    batches = list(source.batches(0, pair.batches))
    paired = pair_blocks(*networks, batches[0].images[:8])
    nn.ModuleList([paired.teacher, *paired.teacher_blocks]).eval()
    return paired, source, batches


class BetweenPasses(RowWriter):
    """Rows are stored before the teacher goes on, by the thread in which it runs."""

    def put(self, rows: Tensor, kept: Sequence[tuple[Column, Sequence[Tensor]]]) -> None:
        for column, parts in kept:
            store_now(column, rows, [part.cpu() for part in parts])


class Filling:
    """The teacher runs and its rows are stored on disk, in another view each time, so that none is there."""

    def __init__(self, teacher: CachedTeacher, batches: list[Batch]) -> None:
        self.teacher, self.batches, self.view = teacher, batches, 0

    def fill(self) -> list[Tensor]:
        """Fill a view with all batches, and wait until the last row is stored; return the outputs of the last."""
        self.view += 1
        for batch in self.batches:
            shown = dataclasses.replace(batch, view=self.view)
            found = self.teacher.outputs(self.teacher.columns.keys(), shown.images, shown)
        self.teacher.settle()
        return [found[k] for k in sorted(found)]


def cached(
    paired: PairedBlocks,
    source: TrainSource,
    batches: list[Batch],
    folder: Path,
    codec: str,
    *,
    tier: str = "disk",
    device: torch.device = CPU,
) -> CachedTeacher:
    """Make a teacher whose rows for these batches are on disk, or in one of the memories."""
    budgets = {f"{memory}_budget": "1TB" for memory in ("device", "host") if memory == tier}
    settings = CacheSettings(plan="all", directory=str(folder) if tier == "disk" else None, codecs=[codec], **budgets)
    examples = paired.teacher_outputs(batches[0].images)
    plan = Plan({k: Kept(tier, LOGITS if k == len(paired.cuts) else codec) for k in examples})
    columns = Columns(paired, source, settings, device, 1).open(plan, examples)
    teacher = CachedTeacher(paired, columns, source.split.total, device)
    for batch in batches:
        teacher.outputs(examples.keys(), batch.images, batch)
    return teacher


def feeding_case(pair: Pair, dataset: Dataset, folder: Path) -> Case:
    """Feed the blocks of one pair in all ways."""
    paired, source, batches = make_pair(pair, dataset)
    arms = {
        RERUN: Arm(paired, Rerun(paired), batches),
        "relay": Arm(paired, Relay(paired), batches),
    }
    for codec in ("fp32", "bf16", "int8"):
        name = "cache" if codec == "fp32" else f"cache, {codec}"
        arms[name] = Arm(paired, cached(paired, source, batches, folder / "pair" / str(pair.size), codec), batches)
    rounded = {"cache, bf16": 4e-3, "cache, int8": 4e-3}
    contenders = []
    for name, arm in arms.items():
        role = "rival" if name == RERUN else "ours"
        contenders.append(
            Contender(name, arm.train, expected=arm.expected, tolerance=rounded.get(name, 0.0), role=role)
        )
    limit = Arm(paired, Relay(paired), batches)
    contenders.append(Contender(ALONE, limit.students, expected=partial(limit.expected, 0), role="limit"))
    return Case("teacher", pair.name, contenders, RERUN, limit.expected, 0.0, {"images": pair.batch}, ALONE)


def filling_case(dataset: Dataset, folder: Path, codec: str) -> Case:
    """Fill a cache on disk. The limit is the teacher alone."""
    pair = dataclasses.replace(SMALL, batches=8)
    paired, source, batches = make_pair(pair, dataset)
    fillings = []
    for name in (BETWEEN, BESIDE):
        place = folder / "filling" / codec / name
        fillings.append(Filling(cached(paired, source, batches, place, codec), batches))
    fillings[0].teacher._writer = BetweenPasses(CPU)
    last, outputs = batches[-1], sorted(fillings[0].teacher.columns)

    def alone() -> list[Tensor]:
        for batch in batches:
            found = paired.teacher_outputs(batch.images, outputs)
        return [found[k] for k in outputs]

    def expected() -> list[Tensor]:
        found = paired.teacher_outputs(last.images, outputs)
        return [found[k].double() for k in outputs]

    contenders = [Contender(BETWEEN, fillings[0].fill), Contender(BESIDE, fillings[1].fill, role="ours")]
    contenders.append(Contender(UNSTORED, alone, role="limit"))
    name = f"filling {codec} rows, {pair.name}"
    extras = {"images": pair.batches * pair.batch}
    return Case("teacher", name, contenders, BETWEEN, expected, 0.0 if codec == "fp32" else 4e-3, extras, UNSTORED)


def size_case(dataset: Dataset, folder: Path) -> Case:
    """Feed the same student from the caches of a large and of a small teacher."""
    contenders = []
    for name in ("resnet110", "resnet20"):
        pair = Pair(name, SMALL.student, SMALL.size, SMALL.batch)
        paired, source, batches = make_pair(pair, dataset)
        arm = Arm(paired, cached(paired, source, batches, folder / "sizes" / name, "fp32"), batches)
        contenders.append(Contender(f"cache of {name}", arm.train, expected=arm.expected, role="ours"))
    return Case("teacher", "teachers of two sizes", contenders, "cache of resnet110", contenders[0].expected, 0.0,
                {"images": SMALL.batch})  # fmt: skip


@dataclass(frozen=True)
class Images:
    """Data sets to take images from: one of 32 px, one of photographs.

    Raises StableKDError if neither is given.
    """

    small: str | None
    large: str | None

    def __post_init__(self) -> None:
        if not self.small and not self.large:
            raise StableKDError(
                "No images were given; give --small for a data set of 32 px images, --large for photographs."
            )

    def of_pairs(self) -> Iterator[tuple[Pair, Dataset]]:
        if self.small is not None:
            yield SMALL, open_dataset(self.small)
        if self.large is not None:
            yield LARGE, open_dataset(self.large, image_size=LARGE.size)


def cases(folder: Path, images: Images) -> Iterator[Case]:
    for pair, dataset in images.of_pairs():
        yield feeding_case(pair, dataset, folder)
        if pair is SMALL:
            yield size_case(dataset, folder)
            for codec in ("fp32", "int8"):
                yield filling_case(dataset, folder, codec)


def run_teacher(folder: Path, images: Images, rounds: int, show: Callable[[list[dict]], None]) -> Measured:
    """Measure all ways to feed blocks. Leaves nothing in `folder`."""
    with scratch(folder) as own, pinned() as pins:
        measured = measure_cases(cases(own, images), rounds, show)
    measured.settings = pins
    return measured
