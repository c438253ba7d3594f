"""The thread that stores rows: what is handed over is stored in order, and what it meets is heard of in the run."""

import threading
import warnings

import pytest
import torch

from stablekd_fast.cache.codecs import RowFormat
from stablekd_fast.cache.columns import Column
from stablekd_fast.cache.manifest import Manifest
from stablekd_fast.cache.memory_rows import MemoryRows
from stablekd_fast.cache.store import RowStore
from stablekd_fast.cache.writer import BATCHES_BEHIND, RowWriter
from stablekd_fast.errors import CacheError
from stablekd_fast.execution import moments

CPU, GPU, FORM, CAPACITY = torch.device("cpu"), torch.device("cuda", 0), RowFormat("fp32", (4,)), 40
PATIENCE = 30


class Gated(MemoryRows):
    """Rows in memory, stored once the gate is open; each batch's first row is noted."""

    def __init__(self, error: Exception | None = None):
        super().__init__(FORM.parts, CAPACITY, CPU)
        self.gate, self.reached, self.error, self.order = threading.Event(), threading.Event(), error, []

    def put(self, rows, parts):
        self.reached.set()
        assert self.gate.wait(PATIENCE)
        self.order.append(int(rows[0]))
        if self.error is not None:
            raise self.error
        super().put(rows, parts)


def batch(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.arange(4 * number, 4 * number + 4)
    return rows, rows[:, None] + torch.arange(4.0) / 8


@pytest.fixture
def writer():
    made = RowWriter(CPU)
    yield made
    made.close()


def hand_over(writer, column, *numbers):
    for number in numbers:
        rows, values = batch(number)
        writer.put(rows, [(column, [values])])
        values.zero_()  # whoever made them goes on with the memory


def test_who_hands_over_goes_on_until_the_ring_is_full(writer):
    column = Column("one", FORM, Gated())
    hand_over(writer, column, *range(BATCHES_BEHIND))
    assert column.rows.reached.wait(PATIENCE) and len(column.rows) == 0
    more = threading.Thread(target=hand_over, args=(writer, column, BATCHES_BEHIND))
    more.start()
    more.join(0.2)
    assert more.is_alive(), "as many batches wait as may"
    column.rows.gate.set()
    more.join(PATIENCE)
    writer.settle()
    assert column.rows.order == [4 * number for number in range(BATCHES_BEHIND + 1)]
    rows, values = batch(1)
    assert torch.equal(column.rows.gather(rows)[0], values), "what was handed over was copied"


def test_rows_under_way_are_waited_for_and_no_others(writer):
    column = Column("one", FORM, Gated())
    hand_over(writer, column, 0)
    assert writer.await_rows(torch.tensor([4, 5])) is False
    threading.Timer(0.2, column.rows.gate.set).start()
    assert writer.await_rows(torch.tensor([9, 3])) is True
    assert column.rows.complete(torch.tensor([3]))


@pytest.mark.parametrize("wait", [RowWriter.settle, RowWriter.close], ids=["settle", "close"])
def test_all_is_stored_when_it_was_waited_for(wait):
    writer, column = RowWriter(CPU), Column("one", FORM, Gated())
    hand_over(writer, column, 0, 1)
    threading.Timer(0.2, column.rows.gate.set).start()
    wait(writer)
    assert len(column.rows) == 8
    writer.close()


def test_a_column_without_room_is_told_once_and_the_others_go_on(writer, tmp_path):
    """The budget has room for one shard of as many rows as are expected."""
    small = RowStore(tmp_path / "x", Manifest(FORM.parts, 100, {}), write=True, expected=8, budget=6000)
    columns = [Column("small", FORM, small), Column("large", FORM, Gated())]
    columns[1].rows.gate.set()
    with pytest.warns(RuntimeWarning) as said:
        for number in range(5):
            rows, values = batch(number)
            writer.put(rows, [(column, [values]) for column in columns])
        writer.settle()
    assert [str(one.message).partition(": The cache in")[0] for one in said] == [
        "small is cached no further, the live teacher serves what is missing"
    ]
    assert said[0].filename.endswith("test_writer.py"), "who handed over is told"
    assert (columns[0].closed, columns[1].closed) == (True, False)
    assert (len(small), len(columns[1].rows)) == (8, 20)
    small.close()


def test_what_the_thread_meets_is_raised_in_the_run_and_nothing_is_stored_after_it():
    writer, column = RowWriter(CPU), Column("one", FORM, Gated(CacheError("the disk is gone")))
    hand_over(writer, column, 0, 1)
    column.rows.gate.set()
    with pytest.raises(CacheError, match="the disk is gone"):
        writer.settle()
    writer.close()
    assert column.rows.order == [0]


def test_close_raises_what_nobody_has_heard_of():
    writer, column = RowWriter(CPU), Column("one", FORM, Gated(CacheError("the disk is gone")))
    hand_over(writer, column, 0)
    column.rows.gate.set()
    with pytest.raises(CacheError, match="the disk is gone"):
        writer.close()
    assert "rows on their way" not in " ".join(thread.name for thread in threading.enumerate())


class Late:
    """A copy that never arrives, as that of a GPU which waits for a rank that is lost."""

    def __init__(self, tensors):
        self.arrived = False


def test_a_device_that_is_given_up_is_not_waited_for(monkeypatch):
    monkeypatch.setattr("stablekd_fast.cache.writer.HostCopy", Late)
    monkeypatch.setattr(moments, "_GIVEN_UP", set())
    writer, column = RowWriter(GPU), Column("one", FORM, Gated())
    hand_over(writer, column, 0)
    closing = threading.Thread(target=writer.close)
    closing.start()
    closing.join(0.2)
    assert closing.is_alive(), "a copy that is late is waited for"
    moments.give_up(GPU)
    closing.join(PATIENCE)
    assert not closing.is_alive() and not column.rows.reached.is_set()


def test_no_thread_is_started_where_nothing_is_stored():
    before = threading.active_count()
    writer = RowWriter(CPU)
    assert writer.await_rows(torch.arange(3)) is False
    writer.settle()
    with warnings.catch_warnings(action="error"):
        writer.close()
    assert threading.active_count() == before
