"""What every source promises: it can be iterated any number of times at once, in any order, broken off anywhere, and
each iteration gives the batches that a source of its own would have given, bit for bit."""

import random
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stablekd_fast.data import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Batch,
    EvalSource,
    StreamSource,
    TrainSource,
    open_dataset,
)

DALI = pytest.mark.dali
STEPS = 9
Open = Callable[[int], Generator[Batch]]
"""Begins an iteration at a step."""


def train_source(root, kind: str, **settings) -> TrainSource:
    mix = settings.pop("mix", None)
    dataset = open_dataset(root, image_size=64 if kind != "resident" else None, on_bad_image="skip")
    settings = dict(batch_size=8, seed=5, classes=len(dataset.classes), source=kind) | settings
    augmentation = replace(dataset.augmentation, mix=mix, jitter=0.4 if mix else 0.0)
    return TrainSource(dataset.train, augmentation, IMAGENET_MEAN, IMAGENET_STD, **settings)


def opener(kind: str, root: Path, **settings) -> Open:
    """A source that nobody has used yet."""
    if kind.startswith("evaluation"):
        dataset = open_dataset(root, image_size=None if kind.endswith("small") else 64, on_bad_image="skip")
        workers = settings.get("workers", 0)
        evaluated = EvalSource(dataset.train, IMAGENET_MEAN, IMAGENET_STD, batch_size=4, workers=workers)

        def from_step(start: int) -> Generator[Batch]:
            for number, batch in enumerate(evaluated.batches()):
                if number >= start:
                    yield batch

        return from_step
    source = train_source(root, "dali" if kind == "dali-stream" else kind, **settings)
    if kind == "dali-stream":
        stream = StreamSource(source)  # each call begins a pass of its own, in an order that its first step decides
        return lambda start: stream.batches(start, STEPS)
    return lambda start: source.batches(start, STEPS)


def same(one: Batch, other: Batch) -> bool:
    return (
        torch.equal(one.sample_ids, other.sample_ids)
        and torch.equal(one.labels, other.labels)
        and torch.equal(one.pixels, other.pixels)
    )


class Iterations:
    """Iterations that are opened, moved on and broken off at random. Every batch must be the expected one."""

    def __init__(self, begin: Open, expected: Callable[[int], list[Batch]], seed: int) -> None:
        self.begin, self.expected, self.chance = begin, expected, random.Random(seed)
        self.running: list[list] = []
        self.compared = 0

    def open(self) -> None:
        start = self.chance.randrange(STEPS - 1)
        self.running.append([self.begin(start), start, 0])

    def move(self) -> None:
        iteration = self.chance.choice(self.running)
        batches, start, done = iteration
        expected = self.expected(start)
        batch = next(batches, None)
        assert (batch is None) == (done == len(expected)), (start, done)
        if batch is None:
            self.running.remove(iteration)
            return
        assert same(batch, expected[done]), f"the batch {done} of an iteration from step {start}"
        iteration[2] += 1
        self.compared += 1

    def break_off(self) -> None:
        batches, *_ = self.running.pop(self.chance.randrange(len(self.running)))
        how = self.chance.choice(["close", "forget", "raise"])
        if how == "close":
            batches.close()
        elif how == "raise":
            with pytest.raises(KeyboardInterrupt):
                batches.throw(KeyboardInterrupt())

    def go(self, actions: int) -> None:
        for _ in range(actions):
            if len(self.running) < 2 or (len(self.running) < 4 and self.chance.random() < 0.1):
                self.open()
            elif self.chance.random() < 0.12:
                self.break_off()
            else:
                self.move()


def references(kind: str, root: Path, **settings) -> Callable[[int], list[Batch]]:
    """The batches from a step on, made by a source of their own: of the first step alone where steps have names."""
    whole: dict[int, list[Batch]] = {}

    def expected(start: int) -> list[Batch]:
        first = start if kind == "dali-stream" else 0
        if first not in whole:
            whole[first] = list(opener(kind, root, **settings)(first))
        return whole[first][start - first :]

    return expected


SOURCES = [
    ("resident", {}),
    ("resident", {"mix": "cutmix"}),
    ("evaluation small", {}),
    *(("torchvision", {"prefetch": prefetch, "workers": workers}) for prefetch in (1, 2, 4) for workers in (0, 2)),
    ("torchvision", {"mix": "mixup", "workers": 2}),
    ("evaluation", {"workers": 2}),
    ("evaluation", {"workers": 0}),
    *(pytest.param("dali", {"prefetch": p, "workers": w}, marks=DALI) for p in (1, 2, 4) for w in (0, 2)),
    pytest.param("dali", {"mix": "cutmix", "workers": 2}, marks=DALI),
    *(pytest.param("dali-stream", {"prefetch": prefetch}, marks=DALI) for prefetch in (1, 2, 4)),
]


@pytest.fixture
def root_of(strange_tree, write_tree, write_large_tree):
    """Images as users have them: broken files and strange JPEGs among the large ones. DALI's own reader takes only
    sound ones."""

    def find(kind: str) -> Path:
        if kind in ("resident", "evaluation small"):
            return write_tree(train=12)
        return write_large_tree(train=6) if kind == "dali-stream" else strange_tree[0]

    return find


@pytest.mark.parametrize("kind, settings", SOURCES)
def test_iterations_of_one_source_do_not_disturb_each_other(root_of, kind, settings):
    root = root_of(kind)
    expected = references(kind, root, **settings)
    iterations = Iterations(opener(kind, root, **settings), expected, seed=len(str(settings)))
    iterations.go(70)
    assert iterations.compared > 30


@pytest.mark.parametrize("kind", ["resident", "torchvision", pytest.param("dali", marks=DALI), "evaluation"])
def test_threads_may_iterate_one_source_at_once(root_of, kind):
    root = root_of(kind)
    expected, begin = references(kind, root, workers=2), opener(kind, root, workers=2)

    def run(seed: int) -> int:
        iterations = Iterations(begin, expected, seed)
        iterations.go(30)
        return iterations.compared

    expected(0)
    with ThreadPoolExecutor(2) as pool:
        assert min(pool.map(run, range(4))) > 8


@pytest.mark.parametrize("kind", ["torchvision", pytest.param("dali", marks=DALI)])
def test_how_far_ahead_is_decoded_and_by_how_many_changes_no_bit(root_of, kind):
    root = root_of(kind)
    whole = [
        list(opener(kind, root, prefetch=prefetch, workers=workers)(0))
        for prefetch, workers in ((1, 0), (2, 2), (4, 1))
    ]
    assert all(same(one, other) for others in whole[1:] for one, other in zip(whole[0], others, strict=True))


@DALI
def test_an_image_that_dali_gives_up_on_spoils_no_other_iteration(strange_tree):
    """Really damaged bytes in DALI's hands: a header, a scan that is none, an end. Both iterations meet it."""
    root, _ = strange_tree
    sound = (root / "train" / "b" / "plain1.jpg").read_bytes()
    frame = sound.index(b"\xff\xda")
    (root / "train" / "b" / "plain1.jpg").write_bytes(sound[: frame + 4] + b"\xff\xd9")
    for prefetch in (1, 2, 4):
        settings = {"prefetch": prefetch, "workers": 2}
        iterations = Iterations(opener("dali", root, **settings), references("dali", root, **settings), seed=prefetch)
        iterations.go(60)
        assert iterations.compared > 25


@DALI
def test_an_evaluation_every_few_steps_makes_no_pipeline_and_leaves_no_thread(strange_tree, monkeypatch):
    from stablekd_fast.data import dali

    made = []

    class Counted(dali._Pipeline):
        def __init__(self, *arguments):
            made.append(arguments)
            super().__init__(*arguments)

    monkeypatch.setattr(dali, "_Pipeline", Counted)
    source = train_source(strange_tree[0], "dali", workers=2)
    threads = threading.active_count()
    training = source.batches(0, STEPS)
    for _ in range(STEPS):
        next(training)
        assert len(list(source.batches(0, 2))) == 2
    training.close()
    list(source.batches(0, STEPS))
    assert len(made) == 2, "one for training, one for what is looked at in between"
    assert threading.active_count() == threads
