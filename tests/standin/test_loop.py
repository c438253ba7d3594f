"""The loop on a stand-in GPU: its times are the device's, and a rank that is lost inside a captured step is named."""

import contextlib
import time
from types import SimpleNamespace

import pytest
import torch

from stablekd_fast.data import Batch
from stablekd_fast.distributed import ranks as ranks_module
from stablekd_fast.distributed.ranks import Ranks
from stablekd_fast.engine.checkpoint import RunState
from stablekd_fast.engine.loop import Engine
from stablekd_fast.engine.schedule import Optimizer, PlannedStage, Stage
from stablekd_fast.engine.stage import LossReader
from stablekd_fast.errors import RankError
from stablekd_fast.execution.side import Side

GPU = torch.device("cuda", 0)
STEPS, BATCH = 40, 16


class Store:
    """What ranks tell each other beside exchanges: rank 1 was last heard of at step 12."""

    def __init__(self):
        self.values = {"stablekd/at/1": f'["step 12, stage 1|2", {time.time()}]'}

    def set(self, key, value):
        self.values[key] = value

    def get(self, key):
        return self.values[key]

    def check(self, keys):
        return all(key in self.values for key in keys)


class Log(list):
    def emit(self, kind, **fields):
        self.append({"kind": kind, **fields})


class OnGpu:
    """Losses that lie on the GPU: nothing but where they are counts."""

    device = GPU


class Loop:
    """An engine in a stage of `STEPS` steps, whose batches and steps take the device's time and none of the host's."""

    def __init__(self, gpu, ranks, *, waiting=0.0, losses=None) -> None:
        self.gpu, self.log = gpu, Log()
        source = SimpleNamespace(batch_size=BATCH, steps_per_epoch=STEPS, refresh_stored=lambda: None)
        every = SimpleNamespace(evaluate=0, checkpoint=1000, log=10)
        parts = SimpleNamespace(
            device=GPU, ranks=ranks, source=source, intervals=every,
            execution=SimpleNamespace(image_dtype=torch.float32), stages=[SimpleNamespace(last=1000)], bn_batches=0,
            synthesised=None,
        )  # fmt: skip
        self.engine = Engine(parts, RunState(), self.log)
        step = SimpleNamespace(
            name="1", auxiliary=None,
            inputs=SimpleNamespace(load=lambda name, value: None, device=torch.device("cpu"), wants_ids=False),
            losses=losses or torch.zeros(10),
            group=[1], state=lambda: [],
        )  # fmt: skip
        divided = SimpleNamespace(
            steps=[step], own=[step], training=contextlib.nullcontext, broadcast_losses=lambda: 0.0,
            broadcast_state=lambda: None,
        )  # fmt: skip

        def batches(*_):
            for _ in range(STEPS):
                gpu.seconds += waiting  # the device has nothing to do meanwhile
                yield Batch(torch.arange(BATCH), 0, None, torch.zeros(BATCH, dtype=torch.int64))

        self.stage = SimpleNamespace(
            planned=PlannedStage(Stage([[0]], steps=1000, optimizer=Optimizer()), 0, 1000), divided=divided,
            steps=[step], own=[step], wanted=set(), needs_images=None, current="",
            source=SimpleNamespace(batches=batches),
            teacher=SimpleNamespace(ahead=lambda given, wanted: given, outputs=lambda *_: {}),
            losses=LossReader([step]), runner=SimpleNamespace(run=self.run), entered_at=0, entered_seconds=0.0, index=0,
            side=Side(GPU), stops=SimpleNamespace(due=lambda step: None),
        )  # fmt: skip

    def run(self):
        self.gpu.seconds += self.gpu.step_seconds
        self.gpu.log.append(("run",))

    def train(self, steps=STEPS):
        for number, batch in enumerate(self.engine._batches(self.stage)):
            if number == steps:
                return
            self.engine._train_step(self.stage, batch)
            self.engine._after_step(self.stage)


def test_speed_and_waiting_are_the_device_s_own_times(gpu):
    """The host hands out 40 steps in no time; on the device each takes 15 ms, after 5 ms without its batch."""
    gpu.step_seconds = 0.015
    loop = Loop(gpu, Ranks(), waiting=0.005)
    loop.train()
    *_, last = [event for event in loop.log if event["kind"] == "train"]
    assert last["data_wait_share"] == pytest.approx(0.25, rel=1e-6)
    assert last["images_per_second"] == pytest.approx(BATCH / 0.020, rel=1e-6)
    assert loop.engine.progress.train_seconds == pytest.approx(0.015 * STEPS, rel=1e-6)


def test_after_a_save_the_next_batch_waits_for_all_that_was_done_in_between(gpu):
    """What is measured and saved asks the same teacher, whose outputs the next batch would overwrite."""
    gpu.step_seconds = 0.01
    loop, ahead = Loop(gpu, Ranks()), []
    loop.engine.parts.intervals.checkpoint = 10
    loop.engine._save = lambda stage: ahead.append(stage.side._taken)
    before = loop.engine._after_step
    loop.engine._after_step = lambda stage: (ahead.append(stage.side._taken), before(stage))
    loop.train(25)
    assert ahead == [True] * 10 + [False] + [True] * 10 + [False] + [True] * 5


@pytest.fixture
def two_ranks(monkeypatch):
    monkeypatch.setattr(ranks_module, "_SETTLING_SECONDS", 0.0)
    ranks = Ranks(0, 2, timeout=0.5, _store=Store())
    ranks.where = lambda: "step 13, stage 1|2"
    return ranks


def test_a_rank_that_is_lost_inside_a_captured_step_is_named_within_the_timeout(gpu, two_ranks, monkeypatch):
    """No watch of NCCL's sees into a graph: the step never ends, and neither does the copy of its losses. The host must
    not wait for them without a limit."""
    gpu.hangs = True
    empty = torch.empty
    monkeypatch.setattr(torch, "empty_like", lambda *_, **__: SimpleNamespace(copy_=lambda *_, **__: None))
    loop = Loop(gpu, two_ranks, losses=OnGpu())
    start = time.monotonic()
    with pytest.raises(RankError, match=r"Missing: rank 1, last heard of at step 12, stage 1\|2"):
        loop.train()
    assert 0.4 < time.monotonic() - start < 5
    assert torch.empty is empty
    assert gpu.log.count(("run",)) <= 10, "more steps in the device's queue would make the host wait in a launch"


def test_nobody_waits_for_a_device_that_was_given_up(gpu, two_ranks):
    from stablekd_fast.execution import moments
    from stablekd_fast.execution.capture import make_runner

    runner = make_runner("cudagraph", [lambda: None], [], GPU, fall_back=False)
    gpu.hangs = True
    with pytest.raises(AssertionError, match="for ever"):
        runner.close()
    two_ranks.clock = moments.Clock(GPU)
    try:
        with pytest.raises(RankError):
            two_ranks.wait(moments.Moment(GPU), "a step ends")
        assert moments.given_up() and moments.given_up(GPU)
        runner.close()
    finally:
        moments._GIVEN_UP.clear()


def test_a_device_that_comes_through_in_time_is_waited_for(gpu, two_ranks):
    from stablekd_fast.execution.moments import Moment

    moment, seen = Moment(GPU), []

    def query():
        seen.append(time.monotonic())
        return len(seen) > 20

    moment._event.query = query
    two_ranks.wait(moment, "a step ends")
    assert len(seen) == 21
