"""Signals that ask a run to end: it finishes its step, saves, says how to go on, and is resumed to the same bits."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from stablekd_fast.engine.checkpoint import load_metadata, load_tensors
from tests.processes import Forked

TRAINING = [
    "distill", "--data", "digits", "--method", "ce", "--student", "resnet20", "--epochs", "1.5", "--validation", "40",
    "--bn-images", "64", "--precision", "fp32", "--checkpoint-every", "1000", "--log-every", "4", "--device", "cpu",
]  # fmt: skip


def start(out, *more):
    return Forked("-m", "stablekd_fast", *TRAINING, "--out", out, *more)


def interpreter(out):
    """Started as a user starts it."""
    command = [sys.executable, "-m", "stablekd_fast", *TRAINING, "--out", out]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(out, kind, seconds=240):
    """Wait until the run's log has an event of a kind."""
    until = time.time() + seconds
    while time.time() < until:
        log = out / "events.jsonl"
        if log.exists() and f'"{kind}"' in log.read_text():
            return
        time.sleep(0.02)
    raise AssertionError(f"no event {kind!r} came")


def weights(out):
    return load_tensors(out / "student.safetensors")[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    process = start(out)
    assert process.wait(600) == 0
    return weights(out)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_the_resumed_run_has_the_same_bits(tmp_path, whole, number):
    out = tmp_path / "out"
    process = interpreter(out) if number == signal.SIGTERM else start(out)
    wait_for(out, "train")
    process.send_signal(number)
    said = process.communicate(timeout=240)[0]
    step = load_metadata(out / "checkpoint.safetensors")["progress"]["step"]
    assert process.returncode == 128 + number and step > 3
    assert f"Ended by {number.name} after step {step} of " in said and "--resume" in said and "Traceback" not in said
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint.safetensors", "events.jsonl"], "nothing is left"
    assert start(out, "--resume").wait(600) == 0
    found = weights(out)
    assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole)
    steps = [event["step"] for event in map(json.loads, (out / "events.jsonl").open()) if event["kind"] == "train"]
    assert steps == sorted(set(steps))


def test_an_ignored_signal_stays_ignored(tmp_path):
    """As under nohup, which hands it on to the interpreter that it starts."""
    out, before = tmp_path / "out", signal.signal(signal.SIGHUP, signal.SIG_IGN)
    process = interpreter(out)
    signal.signal(signal.SIGHUP, before)
    wait_for(out, "train")
    process.send_signal(signal.SIGHUP)
    assert process.wait(600) == 0


def test_a_second_signal_ends_the_process_at_once(tmp_path):
    """The first comes in a step that does not end."""
    script = """
import signal, sys, time
from stablekd_fast.execution.signals import watched_signals
with watched_signals() as signals, signals.awaited(True):
    print("ready", flush=True)
    while True:
        time.sleep(0.01)
        if signals.asked and not signals.__dict__.get("told"):
            signals.__dict__["told"] = True
            print("asked", flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "asked\n" and process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == -signal.SIGTERM


def test_before_the_first_step_a_signal_ends_the_run_and_nothing_is_left(tmp_path):
    out = tmp_path / "out"
    process = start(out)
    until = time.time() + 240
    while not (out / ".run.lock").exists():
        assert time.time() < until and process.poll() is None, "it did not take its folder"
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=240)[0]
    assert process.returncode == 128 + signal.SIGTERM and "Ended by SIGTERM. The same command goes on" in said
    assert "Traceback" not in said and not out.exists()


def test_signals_of_a_program_that_handles_them_are_left_to_it():
    from stablekd_fast.execution.signals import watched_signals

    got, before = [], signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    try:
        with watched_signals() as signals:
            os.kill(os.getpid(), signal.SIGTERM)
            assert got == [signal.SIGTERM] and signals.asked is None
    finally:
        signal.signal(signal.SIGTERM, before)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
