"""The second stream, on the stand-in: what is begun when, and what waits for what."""

import torch

from stablekd_fast.data import Batch
from stablekd_fast.engine.feed import Feed
from stablekd_fast.engine.inputs import StageInputs
from stablekd_fast.execution.side import Side

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


def streams(gpu, *kinds):
    """What was put on which stream: (what, its number)."""
    return [entry[:2] for entry in gpu.log if not kinds or entry[0] in kinds]


class Teacher:
    """Says on which stream it was asked."""

    def __init__(self, gpu):
        self.gpu = gpu

    def ahead(self, batches, wanted):
        for batch in batches:
            self.gpu.note("batch", self.gpu.stream)
            yield batch

    def outputs(self, wanted, images, batch):
        self.gpu.note("teacher", self.gpu.stream)
        return {}


class Inputs(StageInputs):
    def __init__(self, gpu):
        super().__init__(CPU)
        self.gpu = gpu

    def load(self, name, value):
        self.gpu.note("load", self.gpu.stream)


def batches(count):
    return [Batch(torch.arange(4), 0, torch.zeros(4, 3, 2, 2), torch.zeros(4, dtype=torch.int64))] * count


def train(gpu, side, steps):
    feed, inputs = Feed(Teacher(gpu), batches(steps), {0}, side), Inputs(gpu)
    while feed.fetch() is not None:
        feed.serve(inputs)
        feed.load(inputs)
        gpu.note("step", gpu.stream)


def test_batches_and_teacher_go_ahead_and_loads_and_steps_do_not(gpu):
    train(gpu, Side(GPU), 2)
    (second,) = {number for what, number in streams(gpu, "batch", "teacher")}
    assert second != 0
    assert {number for what, number in streams(gpu, "load", "step")} == {0}


def test_the_next_batch_waits_for_the_loads_and_not_for_the_step(gpu):
    side, seen = Side(GPU), []
    record = side._event.record
    side._event.record = lambda stream=None: (seen.append(len(gpu.log)), record(stream))
    train(gpu, side, 3)
    # The event that the next batch waits for is recorded after the loads, before the step; the first has nothing yet.
    marks = [[entry[0] for entry in gpu.log[:place]] for place in seen]
    assert marks[0] == []
    assert all(mark[-1] == "load" for mark in marks[1:])
    assert [what for what, _ in streams(gpu)].count("wait event") == 4


def test_the_step_waits_for_the_side(gpu):
    train(gpu, Side(GPU), 1)
    order = [(what, number) for what, number in streams(gpu) if what in ("teacher", "wait", "load")]
    assert [what for what, _ in order] == ["teacher", "wait", "load", "load"]
    assert order[1][1] == 0, "the stream that trains waits"


def test_after_something_else_it_waits_for_all_that_was_given(gpu):
    side, seen = Side(GPU), []
    side.begin()
    side.taken()
    record = side._event.record
    side._event.record = lambda stream=None: (seen.append("recorded"), record(stream))
    side.begin()
    assert seen == [], "the loads' own event serves"
    side.taken()
    side.halt()
    side.begin()
    assert seen == ["recorded", "recorded"], "once for the loads, once for all that came behind them"


def test_where_it_is_not_used_all_is_done_in_order_on_one_stream(gpu):
    train(gpu, Side(GPU, used=False), 2)
    assert {number for _, number in streams(gpu)} == {0}
    assert not [what for what, _ in streams(gpu) if what.startswith("wait")]
    train(gpu, Side(CPU), 1)
