"""Times and speeds that a run reports, by a clock whose seconds are known; losses that arrive late."""

import json
from contextlib import contextmanager

import pytest

from stablekd_fast.engine import loop
from stablekd_fast.engine.stage import LossReader
from stablekd_fast.execution.moments import Clock
from stablekd_fast.report import Recorder

SECONDS = {"training": 3.0, "waiting": 1.0}


class Passed:
    """A moment that the device has passed."""

    passed = True

    def __init__(self, seconds):
        self.seconds = seconds

    def wait(self):
        pass

    def seconds_since(self, start):
        return self.seconds


class KnownClock(Clock):
    """Every timing takes what `SECONDS` says; `handed_out` adds up what the engine was told."""

    def __init__(self, device):
        super().__init__(device)
        self.handed_out = dict.fromkeys(SECONDS, 0.0)
        made.append(self)

    @contextmanager
    def timing(self, name):
        with super().timing(name):
            yield
        self._open[-1] = (name, self._open[-1][1], Passed(SECONDS[name]))

    def collect(self, until=None, *, wait=False):
        found = super().collect(until, wait=wait)
        for name, seconds in found.items():
            self.handed_out[name] += seconds
        return found


made = []


def test_speeds_count_training_and_waiting(make, monkeypatch):
    """A step trains for 3 s and its batch is waited for 1 s; so long takes a reading of losses too."""
    told = []

    def emit(self, kind, **values):
        told.append((kind, values, dict(made[-1].handed_out) if made else dict.fromkeys(SECONDS, 0.0)))
        original(self, kind, **values)

    original = Recorder.emit
    made.clear()
    monkeypatch.setattr(loop, "Clock", KnownClock)
    monkeypatch.setattr(Recorder, "emit", emit)
    distiller = make(epochs=3.0, evaluate_every=1.0)
    result = distiller.run(progress=False)
    entered, entered_at, trained = None, 0, 0
    for kind, values, seconds in told:
        if kind == "stage_start":
            entered, entered_at = sum(seconds.values()), values["step"]
        if kind == "train":
            images = 32 * (values["step"] - entered_at)
            assert values["images_per_second"] == pytest.approx(images / (sum(seconds.values()) - entered))
            assert values["data_wait_share"] == pytest.approx(seconds["waiting"] / sum(seconds.values()))
            assert seconds["waiting"] >= values["step"], "a second for each batch, and for the end of each stage"
            trained += 1
    assert trained > 6
    seconds = made[-1].handed_out
    assert result.wall_seconds == pytest.approx(sum(seconds.values()))
    assert result.data_wait_share == pytest.approx(seconds["waiting"] / sum(seconds.values()))
    assert result.images_per_second == pytest.approx(15 * 32 / sum(seconds.values()))
    assert seconds["training"] >= 3.0 * 15


def test_losses_that_arrive_late_are_logged_with_the_next_step(make, monkeypatch):
    """As on a GPU, where the host does not wait for them: asked right after they were read they are not there yet."""
    asked, logged = [], {}

    def arrived(self):
        if self._reading is None:
            return False
        asked.append(self._reading)
        return asked.count(self._reading) > 1

    class Told(Recorder):
        def emit(self, kind, **values):
            if kind == "train":
                logged[values["step"]] = engines[-1].progress.step
            super().emit(kind, **values)

    engines = []

    class Watched(loop.Engine):
        def __init__(self, parts, state, recorder, signals):
            recorder.__class__ = Told
            engines.append(self)
            super().__init__(parts, state, recorder, signals)

    monkeypatch.setattr(LossReader, "arrived", property(arrived))
    monkeypatch.setattr("stablekd_fast.run.distiller.Engine", Watched)
    distiller = make(out="late", log_every=2, evaluate_every=0, validation=0, checkpoint_every=100)
    distiller.run(progress=False)
    assert logged == {2: 3, 4: 5, 5: 5, 6: 7, 8: 9, 10: 10, 12: 13, 14: 15, 15: 15}, "the end of a stage waits"
    lines = [json.loads(line) for line in open(f"{distiller.config.out}/events.jsonl")]
    prompt = make(out="prompt", log_every=2, evaluate_every=0, validation=0, checkpoint_every=100)
    monkeypatch.undo()
    prompt.run(progress=False)
    others = [json.loads(line) for line in open(f"{prompt.config.out}/events.jsonl")]
    assert losses(lines) == losses(others)


def losses(events):
    return [(event["step"], event["losses"]) for event in events if event["kind"] == "train"]
