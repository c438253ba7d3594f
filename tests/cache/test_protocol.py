"""The protocol of docs/cache-and-views.md: whatever the order of system calls and whoever is killed, no wrong row is
served, no stored row is lost, and no file is left that nobody owns."""

import random
import warnings

import pytest
import torch

from stablekd_fast.cache import maintain
from stablekd_fast.cache import store as store_module
from stablekd_fast.cache.manifest import MANIFEST, Manifest
from stablekd_fast.cache.shard import Part
from stablekd_fast.cache.store import RowStore
from stablekd_fast.errors import CacheError

from .interleaved import Schedule

SAMPLES, SHARD = 12, 5
NAME = "logits.fp32"


def manifest(teacher):
    return Manifest((Part("x", torch.float32, (2,)), Part("y", torch.int8, (3,))), SAMPLES, {"teacher": teacher})


def values(teacher, rows):
    base = rows.float() + (100 if teacher == "A" else 200)
    return [torch.stack([base, -base], 1), rows.to(torch.int8).unsqueeze(1).repeat(1, 3)]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(store_module, "_SMALLEST_SHARD", SHARD * manifest("A").row_bytes)
    monkeypatch.setattr(store_module, "_LARGEST_SHARD", SHARD * manifest("A").row_bytes)


class World:
    """A cache folder, its actors, and what they were promised."""

    def __init__(self, folder, seed):
        self.folder, self.random, self.schedule = folder, random.Random(seed), Schedule(seed)
        self.stored: dict[str, set[int]] = {"A": set(), "B": set()}
        self.deleted = False

    def writer(self, teacher, rows, seals):
        def act():
            try:
                with RowStore(self.folder / NAME, manifest(teacher), write=True, threads=1) as store:
                    for some in rows:
                        some = torch.tensor(some)
                        store.put(some, values(teacher, some))
                        self.stored[teacher] |= set(some.tolist())
                    self.check(store, teacher)
                    if seals:
                        store.seal()
            except CacheError as error:
                assert "were made for something else" in str(error)

        return act

    def reader(self, teacher):
        def act():
            try:
                with RowStore(self.folder / NAME, manifest(teacher), threads=1) as store:
                    self.check(store, teacher)
            except CacheError as error:
                assert any(known in str(error) for known in ("There is no cache", "made for something else", "has no"))

        return act

    def collector(self, half_filled):
        def act():
            self.deleted = True  # whatever it comes to
            try:
                maintain.collect(self.folder, [] if half_filled else [NAME], half_filled=half_filled)
            except CacheError as error:
                assert any(known in str(error) for known in ("There is no c", "in use", "cannot be deleted: No such"))

        return act

    def verifier(self):
        try:
            damaged = maintain.verify(self.folder)[1]
        except CacheError as error:
            assert "There is no cache" in str(error)
        else:
            assert not damaged

    @staticmethod
    def check(store, teacher):
        rows = torch.arange(2 * SAMPLES)
        rows = rows[store.present(rows)]
        for found, wanted in zip(store.gather(rows), values(teacher, rows)):
            assert torch.equal(found, wanted)

    def settle(self):
        """What the next run finds: everything that was stored, and nothing that is not owned."""
        folder = self.folder / NAME
        there = Manifest.load(folder) if (folder / MANIFEST).exists() else manifest("A")
        teacher = there.fingerprint["teacher"]
        with RowStore(folder, manifest(teacher), write=True, threads=1) as store:
            self.check(store, teacher)
            if not self.deleted:
                assert store.present(torch.tensor(sorted(self.stored[teacher]), dtype=torch.int64)).all()
            store.put(torch.arange(SAMPLES), values(teacher, torch.arange(SAMPLES)))
            store.seal()
            self.check(store, teacher)
        names = {path.name for path in folder.iterdir()}
        assert names == {MANIFEST, ".lock", *Manifest.load(folder).shards}
        whole, damaged = maintain.verify(self.folder)
        assert whole[NAME] >= SAMPLES and not damaged


def play(folder, seed):
    """One history: a few actors drawn by the seed, one of which may be killed. Returns how many calls it had."""
    draw = random.Random(seed)
    world = World(folder, seed)
    batches = lambda: [draw.sample(range(2 * SAMPLES), draw.randint(1, 7)) for _ in range(draw.randint(1, 3))]  # noqa: E731
    kinds = {
        "writer": lambda: world.writer("A", batches(), draw.random() < 0.5),
        "other": lambda: world.writer("B", batches(), draw.random() < 0.5),
        "reader": lambda: world.reader(draw.choice("AB")),
        "verifier": lambda: world.verifier,
        "gc": lambda: world.collector(draw.random() < 0.3),
    }
    names = ["writer", *draw.choices(list(kinds), weights=[4, 1, 2, 1, 3], k=draw.randint(1, 3))]
    acts = {f"{name} {number}": kinds[name]() for number, name in enumerate(names)}
    kills = {name: draw.randint(1, 30 if "gc" in name else 90) for name in acts if draw.random() < 0.4}
    try:
        if draw.random() < 0.6:
            world.writer("A", batches(), seals=draw.random() < 0.5)()
        world.schedule.run(acts, kills)
        world.settle()
    except BaseException as error:
        error.add_note(f"history {seed}: {list(acts)}, killed {kills}; its last calls: {world.schedule.trace[-25:]}")
        raise
    return len(world.schedule.trace)


def histories(folder, seeds):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "A file is not used, and left as it is: The header of .* that of rows")
        return sum(play(folder / str(seed), seed) for seed in seeds)


def test_no_order_of_calls_and_no_kill_loses_or_mixes_rows(tmp_path):
    assert histories(tmp_path, range(400)) > 10_000


@pytest.mark.slow
def test_many_more_orders_of_calls(tmp_path):
    assert histories(tmp_path, range(1_000, 11_000)) > 500_000
