"""The teacher behind a cache hands out what the live one does, and runs no block that it need not run."""

import time

import pytest
import torch
from torch import nn

from stablekd_fast.blocks import pair_blocks
from stablekd_fast.cache.columns import Columns, Kept, Plan
from stablekd_fast.cache.settings import CacheSettings
from stablekd_fast.cache.store import RowStore
from stablekd_fast.data import Batch, TrainSource, open_dataset
from stablekd_fast.data.dataset import Augmentation
from stablekd_fast.errors import CacheError
from stablekd_fast.teacher import live as live_module
from stablekd_fast.teacher.cached import CachedTeacher
from stablekd_fast.teacher.live import LiveTeacher, Relay
from stablekd_fast.teacher.parts import _channels_last

CPU, SAMPLES = torch.device("cpu"), 96


def network(width, seed):
    torch.manual_seed(seed)
    layers, inside = [], 3
    for _ in range(3):
        layers.append(nn.Sequential(nn.Conv2d(inside, width, 3, padding=1), nn.ReLU()))
        inside = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


@pytest.fixture(scope="module")
def digits():
    return open_dataset("digits")


class Bench:
    """A pair, images by sample and view, and how often each block of the teacher ran."""

    def __init__(self, digits, width=8):
        self.digits = digits
        self.paired = pair_blocks(
            network(8, 1).eval(), network(width, 2), torch.randn(32, 3, 8, 8), cuts=["0", "1", "2"]
        )
        self.ran = [0] * 4
        for k, block in enumerate(self.paired.teacher_blocks):
            block.register_forward_hook(lambda *_, k=k: self.ran.__setitem__(k, self.ran[k] + 1))

    def batch(self, ids, view=0):
        ids = torch.tensor(ids)
        images = torch.stack([self.image(int(sample), view) for sample in ids])
        return Batch(ids, view, images, ids % 10)

    @staticmethod
    def image(sample, view):
        return torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(1000 * view + sample))

    def teacher(self, plan, directory=None, views=2):
        source = TrainSource(
            self.digits.train.subset(SAMPLES, 0), Augmentation("pad_crop", flip=True), self.digits.mean,
            self.digits.std, batch_size=4, seed=0, device=CPU,
        )  # fmt: skip
        settings = CacheSettings(plan="all", directory=directory, host_budget="1GB")
        examples = self.paired.teacher_outputs(self.batch([0, 1, 2, 3]).images, set(range(4)))
        columns = Columns(self.paired, source, settings, CPU, views).open(Plan(plan), examples)
        self.ran[:] = [0] * 4
        return CachedTeacher(self.paired, columns, source.split.total, CPU)

    def check(self, teacher, batch, wanted, ran):
        self.ran[:] = [0] * 4
        found = teacher.outputs(wanted, batch.images, batch)
        assert self.ran == ran
        expected = self.paired.teacher_outputs(batch.images, wanted)
        assert found.keys() == set(wanted)
        for k in wanted:
            assert torch.equal(found[k], expected[k]), k


EVERYTHING = {0, 1, 2, 3}


@pytest.fixture(params=["host", "disk"])
def kept(request, tmp_path):
    """How outputs are kept, and the folder."""
    return Kept(request.param, "fp32"), str(tmp_path / "rows") if request.param == "disk" else None


def test_what_was_seen_is_served_and_nothing_else(digits, kept):
    bench = Bench(digits)
    teacher = bench.teacher(dict.fromkeys(EVERYTHING, kept[0]), kept[1])
    one, other, later = bench.batch([5, 9, 0, 7]), bench.batch([1, 2, 3, 4]), bench.batch([5, 9, 0, 7], view=1)
    live = [1, 1, 1, 1]
    bench.check(teacher, one, EVERYTHING, live)
    bench.check(teacher, one, EVERYTHING, [0] * 4)
    bench.check(teacher, other, EVERYTHING, live)
    bench.check(teacher, later, EVERYTHING, live)  # other images of the same samples
    bench.check(teacher, bench.batch([0, 9, 5, 4]), EVERYTHING, [0] * 4)
    bench.check(teacher, bench.batch([9, 0], view=1), EVERYTHING, [0] * 4)
    bench.check(teacher, bench.batch([9, 1], view=1), EVERYTHING, live)
    assert teacher.report()["live_batches"] == 4
    assert set(teacher.report()["rows"].values()) == {4 + 4 + 4 + 1}
    assert teacher.needs_images(EVERYTHING, torch.tensor([1, 2]), 0) is False
    assert teacher.needs_images(EVERYTHING, torch.tensor([1, 2]), 1) is True
    assert teacher.needs_images({1}, torch.tensor([1, 20]), 0) is True
    teacher.close()


def test_the_teacher_goes_on_from_the_last_stored_output(digits, kept):
    bench = Bench(digits)
    teacher = bench.teacher({1: kept[0]}, kept[1])
    batch = bench.batch([3, 1, 4, 8])
    bench.check(teacher, batch, {0, 1, 2}, [1, 1, 1, 0])
    bench.check(teacher, batch, {2}, [1, 1, 1, 0])  # what is not wanted is not read
    bench.check(teacher, batch, {1, 2}, [0, 0, 1, 0])
    bench.check(teacher, batch, {1, 3}, [0, 0, 1, 1])
    bench.check(teacher, batch, {0, 1, 2}, [1, 0, 1, 0])
    teacher.close()


@pytest.mark.parametrize("width", [5, 11])
def test_the_teacher_does_not_go_on_from_a_bridged_row(digits, kept, width):
    bench = Bench(digits, width)
    assert bench.paired.bridge_after(1) is not None
    teacher = bench.teacher({1: kept[0]}, kept[1])
    batch = bench.batch([3, 1, 4, 8])
    for _ in range(2):
        bench.check(teacher, batch, {1, 2, 3}, [1, 1, 1, 1])
    bench.check(teacher, batch, {1}, [0] * 4)
    teacher.close()


def test_reading_ahead_serves_its_own_batch_alone(digits, kept):
    bench = Bench(digits)
    teacher = bench.teacher(dict.fromkeys(EVERYTHING, kept[0]), kept[1])
    batches = [bench.batch([4 * n, 4 * n + 1, 4 * n + 2, 4 * n + 3]) for n in range(4)]
    for batch in batches[:3]:
        bench.check(teacher, batch, EVERYTHING, [1, 1, 1, 1])
    got = teacher.ahead(iter(batches[:3]), EVERYTHING)
    assert next(got) is batches[0]
    bench.check(teacher, batches[1], EVERYTHING, [0] * 4)  # not the batch that was read ahead
    bench.check(teacher, batches[0], EVERYTHING, [0] * 4)
    for expected in batches[1:3]:
        assert next(got) is expected
        bench.check(teacher, expected, EVERYTHING, [0] * 4)
    assert next(got, None) is None
    [mixed] = teacher.ahead(iter([batches[3]]), EVERYTHING)  # none of its rows is there
    bench.check(teacher, mixed, EVERYTHING, [1, 1, 1, 1])
    teacher.close()


def test_what_was_read_ahead_is_used_and_not_read_again(digits, tmp_path, monkeypatch):
    bench, began = Bench(digits), []
    submit = RowStore.submit
    monkeypatch.setattr(RowStore, "submit", lambda self, rows, out: (began.append(rows), submit(self, rows, out))[1])
    teacher = bench.teacher({1: Kept("disk", "fp32")}, str(tmp_path / "rows"))
    batches = [bench.batch([0, 1, 2, 3]), bench.batch([4, 5, 6, 7])]
    for batch in batches:
        bench.check(teacher, batch, {1}, [1, 1, 0, 0])
    for batch in teacher.ahead(iter(batches), {1}):
        bench.check(teacher, batch, {1}, [0] * 4)
    assert len(began) == 2
    teacher.close()


def test_a_row_that_was_stored_after_the_reading_began_is_read_all_the_same(digits, kept):
    """Two batches in a row hold the same images: the second one's rows are looked for before the first has stored
    them."""
    bench = Bench(digits)
    teacher = bench.teacher({1: kept[0]}, kept[1])
    batches = [bench.batch([0, 1, 2, 3]), bench.batch([3, 2, 1, 0])]
    ran = iter([[1, 1, 0, 0], [0] * 4])
    for batch in teacher.ahead(iter(batches), {1}):
        bench.check(teacher, batch, {1}, next(ran))
    teacher.close()


def test_rows_on_disk_and_in_main_memory_arrive_together_as_each_is_read_alone(digits, tmp_path):
    """As beside a GPU: rows of both are read ahead into one piece of memory, whatever a stage wants of them."""
    bench, plain = Bench(digits), Bench(digits)
    plan = {0: Kept("host", "fp32"), 1: Kept("disk", "int8"), 2: Kept("host", "int8"), 3: Kept("disk", "fp32")}
    teacher, other = (b.teacher(plan, str(tmp_path / name)) for b, name in ((bench, "a"), (plain, "b")))
    teacher._lies_apart = lambda store: True
    batches = [bench.batch([4 * n, 4 * n + 1, 4 * n + 2, 4 * n + 3]) for n in range(3)]
    for batch in batches:
        for one in (teacher, other):
            one.outputs(EVERYTHING, batch.images, batch)
    for wanted in (EVERYTHING, {0, 1}, {2, 3}, {0}, {3}):
        bench.ran[:] = [0] * 4
        for batch in teacher.ahead(iter(batches), wanted):
            found, alone = teacher.outputs(wanted, None, batch), other.outputs(wanted, None, batch)
            assert found.keys() == alone.keys() == wanted
            assert all(torch.equal(found[k], alone[k]) for k in wanted), wanted
            assert len({found[k].untyped_storage().data_ptr() for k in wanted & {0, 3}}) == 1, "exact rows are views"
        assert bench.ran == [0] * 4
    teacher.close(), other.close()


def test_a_damaged_row_is_an_error_where_it_is_read(digits, tmp_path):
    bench = Bench(digits)
    teacher = bench.teacher({1: Kept("disk", "fp32")}, str(tmp_path / "rows"))
    batch = bench.batch([0, 1, 2, 3])
    bench.check(teacher, batch, {1}, [1, 1, 0, 0])
    teacher.settle()
    [shard] = (tmp_path / "rows").rglob("*shard-*")
    with open(shard, "r+b") as file:
        file.seek(4096 + 100)
        file.write(b"\x12\x34\x56\x78")
    [again] = teacher.ahead(iter([batch]), {1})
    with pytest.raises(CacheError, match="checksum"):
        teacher.outputs({1}, again.images, again)
    teacher.close()


@pytest.fixture
def slow_disk(monkeypatch):
    """A disk that takes its time for each batch."""
    put = RowStore.put
    monkeypatch.setattr(RowStore, "put", lambda self, rows, parts: (time.sleep(0.2), put(self, rows, parts))[1])


def test_the_teacher_goes_on_while_its_rows_are_stored(digits, tmp_path, slow_disk):
    bench = Bench(digits)
    teacher = bench.teacher({1: Kept("disk", "int8")}, str(tmp_path / "rows"))
    store = teacher.columns[1].rows
    for ids in ([0, 1, 2, 3], [4, 5, 6, 7]):
        batch = bench.batch(ids)
        teacher.outputs({1}, batch.images, batch)
        assert not store.complete(batch.sample_ids), "the step has its outputs before they are stored"
    assert teacher.needs_images({1}, torch.tensor([3, 5]), 0) is False, "what is under way is waited for"
    teacher.close()


@pytest.mark.parametrize(
    "wait",
    [CachedTeacher.settle, CachedTeacher.seal, CachedTeacher.report, lambda teacher: teacher.fill({0, 1})],
    ids=["settle", "seal", "report", "fill"],
)
def test_who_must_find_all_rows_waits_for_them(digits, tmp_path, slow_disk, wait):
    bench = Bench(digits)
    teacher = bench.teacher({1: Kept("disk", "fp32")}, str(tmp_path / "rows"))
    for ids in ([0, 1, 2, 3], [4, 5, 6, 7]):
        batch = bench.batch(ids)
        teacher.outputs({1}, batch.images, batch)
    wait(teacher)
    assert len(teacher.columns[1].rows) == 8
    teacher.close()


def test_files_are_closed_behind_the_last_rows(digits, tmp_path, slow_disk):
    bench = Bench(digits)
    teacher = bench.teacher({1: Kept("disk", "fp32")}, str(tmp_path / "rows"))
    batch = bench.batch([0, 1, 2, 3])
    teacher.outputs({1}, batch.images, batch)
    teacher.close()
    again = bench.teacher({1: Kept("disk", "fp32")}, str(tmp_path / "rows"))
    bench.check(again, batch, {1}, [0] * 4)
    again.close()


@pytest.mark.parametrize(
    "stored, rows", [({0}, {0: 4, 1: 0, 2: 4}), ({1}, {0: 0, 1: 4, 2: 4}), (set(), {0: 0, 1: 0, 2: 4})]
)
def test_several_processes_fill_their_own_part_of_the_disk_and_all_of_their_memory(digits, tmp_path, stored, rows):
    bench = Bench(digits)
    plan = {0: Kept("disk", "fp32"), 1: Kept("disk", "fp32"), 2: Kept("host", "fp32")}
    teacher = bench.teacher(plan, str(tmp_path / "rows"))
    teacher.fill(stored)
    bench.check(teacher, bench.batch([0, 1, 2, 3]), {0, 1, 2}, [1, 1, 1, 0])
    teacher.settle()
    assert {k: len(column.rows) for k, column in teacher.columns.items()} == rows
    teacher.close()


def test_a_captured_pass_reads_each_batch_and_is_let_go_of_with_its_shapes(digits, monkeypatch):
    bench, runners = Bench(digits), []

    def made(*arguments, **settings):
        runner = original(*arguments, **settings)
        close = runner.close
        runner.close = lambda: (closed.append(runner), close())
        runners.append(runner)
        return runner

    original, closed = live_module.make_runner, []
    monkeypatch.setattr(live_module, "make_runner", made)
    live = LiveTeacher(bench.paired, "emulate", fall_back=False)
    for number, ids in enumerate(([0, 1], [2, 3], [4, 5], [6, 7, 8], [9, 10, 11], [1, 2, 3])):
        batch = bench.batch(ids)
        found = live.outputs(batch.images, {1, 3})
        expected = bench.paired.teacher_outputs(batch.images, {1, 3})
        assert all(torch.equal(found[k], expected[k]) for k in (1, 3)), number
        assert (len(runners), len(closed)) == [(0, 0), (1, 0), (1, 0), (1, 1), (2, 1), (2, 1)][number]
    live.close()
    assert closed == runners
    assert LiveTeacher(bench.paired).fall_back is True


def test_the_relay_runs_what_is_wanted(digits):
    bench = Bench(digits)
    batch, relay = bench.batch([0, 1]), Relay(bench.paired)
    bench.check(relay, batch, {0, 1}, [1, 1, 0, 0])
    assert relay.outputs(set(), None, batch) == {}
    assert relay.needs_images({0}, batch.sample_ids, 0) and not relay.needs_images(set(), batch.sample_ids, 0)
    own = LiveTeacher(bench.paired)
    assert Relay(bench.paired, own).live is own


def test_what_lies_channels_last_is_known():
    maps = torch.zeros(2, 3, 4, 5)
    assert _channels_last(maps.to(memory_format=torch.channels_last))
    assert not _channels_last(maps)
    assert not _channels_last(maps.transpose(2, 3))
    assert not _channels_last(torch.zeros(2, 3, 4).transpose(1, 2))
    assert not _channels_last(torch.zeros(2, 1, 4, 5).to(memory_format=torch.channels_last)), "both orders are one"
