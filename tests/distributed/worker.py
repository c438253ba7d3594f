"""What the processes of these tests run: `worker.py TASK ...`."""

import dataclasses
import os
import signal
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "engine"))
from conftest import random_batch, settled, small_net

from stablekd_fast.cache import CacheSettings
from stablekd_fast.config import DistillConfig
from stablekd_fast.data import TrainSource
from stablekd_fast.distributed import join
from stablekd_fast.engine.loop import Engine
from stablekd_fast.errors import Interrupted
from stablekd_fast.run.distiller import Distiller

RANK, CPU = int(os.environ.get("RANK", 0)), torch.device("cpu")
BASE = DistillConfig(
    method="blocks", epochs=6.0, subset=320, validation=40, batch_size=32, log_every=5, bn_images=64,
    cuts=["0", "1", "2"], checkpoint_every=7, device="cpu", precision="fp32", bridge="pca", views=2, timeout=60,
)  # fmt: skip


def distiller(out: str, teacher_seed: int = 1, **settings) -> Distiller:
    config = dataclasses.replace(BASE, out=out, **settings)
    teacher = settled(small_net(6, teacher_seed))
    digits = torch.load(os.environ["DIGITS"], weights_only=False)
    return Distiller(config, teacher=teacher, student=small_net(2, 2), dataset=digits)


def train(out: str, **settings) -> None:
    distiller(out, **settings).run(progress=False)


def cached(out: str, directory: str) -> None:
    train(out, parallel="blocks", cache=CacheSettings(plan="all", directory=directory, codecs=["int8"], logits="fp16"))


def say(*words: object) -> None:
    """A line at once: ranks write to one pipe."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def counted(out: str, directory: str) -> None:
    """Print how many batches of images this rank made while it trained."""
    made, count = TrainSource._resident_batch, 0

    def counting(*arguments):
        nonlocal count
        count += 1
        return made(*arguments)

    def train_step(engine, *arguments, step=Engine._train_step):
        TrainSource._resident_batch = counting  # what was made before was measured with
        step(engine, *arguments)

    Engine._train_step = train_step
    rows = CacheSettings(plan="all", directory=directory) if directory else CacheSettings()
    train(out, parallel="blocks", cache=rows, validation=0, evaluate_every=0)
    say("MADE", RANK, count)


def cores() -> None:
    before = os.sched_getaffinity(0)
    join(CPU, 60).finish()
    say("CORES", RANK, *sorted(before), "->", *sorted(os.sched_getaffinity(0)))


def different(out: str) -> None:
    train(out, seed=RANK, batch_size=32 if RANK == 0 else 16)


def other_weights(out: str, directory: str) -> None:
    """Each rank has a teacher of its own."""
    cache = CacheSettings(plan="all", directory=directory)
    distiller(out, teacher_seed=1 + RANK, cache=cache).run(progress=False)


def hanging(out: str) -> None:
    made, count = distiller(out, method="kd", log_every=1, timeout=4.0), 0
    batches = made.source.batches

    def stopping(*steps):
        nonlocal count
        for batch in batches(*steps):
            count += 1
            if RANK == 1 and count > 30:
                os.kill(os.getpid(), signal.SIGSTOP)
            yield batch

    made.source.part = lambda *_: made.source
    made.source.batches = stopping
    made.run(progress=False)


def slow(out: str, parallel: str, *resume: str) -> None:
    """Train long enough that a signal comes in the middle."""

    def step(*arguments, train_step=Engine._train_step):
        time.sleep(0.02)
        train_step(*arguments)

    Engine._train_step = step
    try:
        train(out, parallel=parallel, method="blocks" if parallel == "blocks" else "kd", resume=bool(resume))
    except Interrupted as error:
        say(error)
        sys.exit(128 + error.signal)


def parting(how: str) -> None:
    """Average over a data axis of two among four ranks, of which the last one stops in the midst of it: before the
    exchange, or before that of a batch norm in the forward pass."""
    from stablekd_fast.distributed import Layout
    from stablekd_fast.distributed.norms import SyncNorm

    ranks = join(CPU, 6)
    averaging = Layout(2, 2, (0, 1)).averaging(ranks, CPU)
    norm = SyncNorm(torch.nn.BatchNorm2d(3), averaging)
    for _ in range(3):
        averaging.average([torch.ones(4)])
        norm(torch.randn(2, 3, 4, 4))
    if RANK == 3:
        os.kill(os.getpid(), signal.SIGSTOP)
    if RANK == 2:
        start = time.monotonic()
        try:
            norm(torch.randn(2, 3, 4, 4)) if how == "in a norm" else averaging.average([torch.ones(4)])
        except Exception as error:
            say("ENDED", f"{time.monotonic() - start:.1f}", type(error).__name__, str(error))
        os._exit(0)
    time.sleep(120)  # the others are busy elsewhere


def data_axis() -> None:
    """Print, in float64 over 20 steps and in float32 over one, how far training on parts of batches is from training on
    whole ones."""
    ranks = join(CPU, 60)
    for auxiliary in ("fitnet", "ckd"):
        for dtype, steps in ((torch.float64, 20), (torch.float32, 1)):
            for norms in ("synced", "frozen"):
                found = compare_parts(ranks, dtype, norms, steps, auxiliary)
                if ranks.is_first:
                    print("APART", dtype, norms, *found)
    ranks.finish()


def contrast() -> None:
    """Print how far ContrastiveLoss on parts of batches is from one on whole ones: losses, gradients and queues."""
    import torch.distributed as dist

    from stablekd_fast.losses import ContrastiveLoss

    ranks = join(CPU, 60)
    torch.manual_seed(0)
    parts, whole = ContrastiveLoss(8, queue=20, group=dist.group.WORLD).double(), ContrastiveLoss(8, queue=20).double()
    apart, mine = [], slice(ranks.rank * 6, (ranks.rank + 1) * 6)
    for _ in range(3):
        student, teacher = torch.randn(12, 8, dtype=torch.float64, requires_grad=True), torch.randn(12, 8).double()
        losses = parts(student[mine], teacher[mine]), whole(student, teacher)
        own, theirs = (torch.autograd.grad(loss, student)[0] for loss in losses)
        means = torch.cat([losses[0].detach().view(1), own.flatten()])
        dist.all_reduce(means)
        expected = torch.cat([losses[1].detach().view(1), theirs.flatten()])
        apart += [(means / ranks.size - expected).abs().max().item(), (parts.kept - whole.kept).abs().max().item()]
    say("APART", max(apart), int(parts.count))
    ranks.finish()


def compare_parts(ranks, dtype: torch.dtype, norms: str, steps: int, auxiliary: str) -> list[float]:
    """Largest distances over all ranks: of weights, from the start (to show that they moved), of running statistics and
    an auxiliary loss's memory, of losses."""
    import torch.distributed as dist

    from stablekd_fast.blocks import pair_blocks
    from stablekd_fast.distributed import Layout
    from stablekd_fast.engine.inputs import StageInputs, load_batch
    from stablekd_fast.engine.schedule import Optimizer
    from stablekd_fast.engine.step import GroupStep, Rates
    from stablekd_fast.objectives import Facts, Objectives, objective
    from stablekd_fast.teacher.live import Relay

    layout = Layout(1, ranks.size, (0,))
    # fitnet has a regressor that is averaged like the student; ckd remembers the embeddings of all ranks
    options = {"fitnet": {}, "ckd": {"queue": 40, "temperature": 0.5}}[auxiliary]
    further = objective("auxiliary", auxiliary, {"weight": 1.0, **options})
    aims = Objectives(objective("feature", "mse", {}), objective("logits", "kd", {}), align="all", auxiliary=further)

    def step_of(averaging):
        teacher, student = settled(small_net(3, 1)), settled(small_net(2, 2))
        paired = pair_blocks(teacher, student, random_batch(0).images, cuts=["0", "1", "2"])
        for module in (teacher, student, *paired.teacher_blocks, *paired.student_blocks):
            module.to(dtype)
        if norms == "synced":
            torch.nn.ModuleList([student, *paired.student_blocks]).train()
        rates = Rates.constant(0.05)
        group = list(range(len(paired)))
        shapes = [*(cut.student_shape for cut in paired.cuts), (10,)]
        own = aims.made(Facts(10, 100, 16, (8, 8), shapes, shapes, [1] * len(paired.cuts), CPU), seed=0)
        assert own.module is not None
        own.module.to(dtype)
        step = GroupStep(
            paired, group, own, Optimizer("sgd", weight_decay=0.0), StageInputs(CPU), rates=rates, averaging=averaging,
            sync_norms=norms == "synced",
        )  # fmt: skip
        return step, Relay(paired)

    def train_on(step, teacher, batch):
        batch = dataclasses.replace(batch, images=batch.images.to(dtype))
        load_batch(step.inputs, teacher, {0, 1, 2, 3}, batch)
        step.run()

    own, teacher = step_of(layout.averaging(ranks, CPU))
    whole, whole_teacher = step_of(None)
    for number in range(steps):
        batch = random_batch(number, 16)
        size = 16 // ranks.size
        mine = slice(ranks.rank * size, (ranks.rank + 1) * size)
        part = dataclasses.replace(
            batch, images=batch.images[mine], labels=batch.labels[mine], sample_ids=batch.sample_ids[mine]
        )
        train_on(own, teacher, part)
        train_on(whole, whole_teacher, batch)
    apart = max((a - b).abs().max().item() for a, b in zip(own.parameters.values(), whole.parameters.values()))
    moved = max(
        (a - b).abs().max().item() for a, b in zip(own.parameters.values(), step_of(None)[0].parameters.values())
    )
    statistics = max((a - b).abs().max().item() for a, b in zip(_remembered(own), _remembered(whole)))
    losses = abs(own.losses[0] - whole.losses[0]).item()
    found = torch.tensor([apart, moved, statistics, losses], dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.tolist()


def _remembered(step) -> list[torch.Tensor]:
    running = [value for name, value in step.paired.student.named_buffers() if "running" in name]
    return [*running, *step.auxiliary.buffers()]


TASKS = {
    "train": lambda out, parallel: train(out, parallel=parallel),
    "resume": lambda out: train(out, parallel="blocks", resume=True),
    "stablekd": lambda out, parallel: train(out, parallel=parallel, method="stablekd"),
    "cached": cached,
    "counted": counted,
    "cores": cores,
    "different": different,
    "other weights": other_weights,
    "hanging": hanging,
    "slow": slow,
    "data": data_axis,
    "contrast": contrast,
    "ckd": lambda out: train(out, method="ckd", parallel="data"),
    "parting": parting,
}

if __name__ == "__main__":
    TASKS[sys.argv[1]](*sys.argv[2:])
