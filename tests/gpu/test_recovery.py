"""What goes wrong on a GPU and is lived with: captures that fail, a device that hangs, a run that is broken off."""

import dataclasses
import subprocess
import sys
import time

import pytest
import torch

from stablekd_fast.config import DistillConfig
from stablekd_fast.data import open_dataset
from stablekd_fast.engine.checkpoint import load_tensors
from stablekd_fast.engine.loop import Engine
from stablekd_fast.errors import CaptureError
from stablekd_fast.execution.capture import make_runner
from stablekd_fast.run.distiller import Distiller

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("real_gpu")]


def waits(weight):
    torch.cuda.synchronize()


def reads(weight):
    weight.sum().item()


def runs_out(weight):
    torch.empty(1 << 40, device=weight.device)


def interrupts(weight):
    raise KeyboardInterrupt


@pytest.mark.parametrize("how", [waits, reads, runs_out, interrupts])
def test_ten_failed_captures_leave_memory_generator_and_streams_as_they_were(small, how):
    weight = torch.ones(1 << 22, device=small.device)

    def body():
        torch.nn.functional.dropout(weight * 2).sum()
        if torch.cuda.is_current_stream_capturing():
            how(weight)

    def fail():
        with pytest.raises((CaptureError, torch.OutOfMemoryError, KeyboardInterrupt)):
            make_runner("cudagraph", [body, body], [weight], small.device, fall_back=False)

    fail()  # what libraries keep for good is there from now on
    torch.cuda.empty_cache()
    before, random = (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()), torch.cuda.get_rng_state()
    for _ in range(10):
        fail()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() <= before[0] + (64 << 10)
    assert torch.cuda.memory_reserved() <= before[1] + (2 << 20), "one smallest piece more, not one per failure"
    assert torch.equal(random, torch.cuda.get_rng_state())
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    freed = torch.empty(1 << 28, dtype=torch.uint8, device=small.device)
    held = torch.cuda.memory_reserved()
    del freed
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < held, "the allocator gives back what is freed"
    steps = small.steps(small.pair(dropout=0.1), [[0], [1], [2], [3]])
    with small.runner(steps) as runner:
        runner.run()
    assert all(torch.isfinite(step.losses[-1]) for step in steps)


HANGING = """
import torch
from stablekd_fast.cli import main
from stablekd_fast.distributed.ranks import Ranks
from stablekd_fast.execution.capture import make_runner
from stablekd_fast.execution.moments import Clock, Moment
import stablekd_fast.run.distiller as distiller

class Hanging:
    def __init__(self, config):
        pass

    def run(self):
        device = torch.device("cuda", 0)
        ranks = Ranks(0, 2, timeout=1.0, clock=Clock(device))
        runner = make_runner("cudagraph", [lambda: torch.cuda._sleep(10**9)], [], device, fall_back=False)
        try:
            for _ in range(60):
                runner.run()
            ranks.wait(Moment(device), "a step ends")
        finally:
            runner.close()

distiller.Distiller = Hanging
main(["distill"])
"""


def test_a_process_whose_device_hangs_leaves_with_a_sentence():
    """A minute of work stands for an exchange that never ends. Waiting for the device at exit would take that long."""
    start = time.monotonic()
    found = subprocess.run([sys.executable, "-c", HANGING], capture_output=True, text=True, timeout=50)
    assert found.returncode == 2 and "waited in vain at the start, where a step ends (timeout 1 s)" in found.stderr
    assert time.monotonic() - start < 25


def test_a_run_with_dropout_that_is_broken_off_ends_as_one_that_was_not(small, tmp_path, monkeypatch):
    """Captured steps draw from the device's generator, whose state a checkpoint holds."""
    config = DistillConfig(
        method="blocks", epochs=3.0, subset=320, validation=0, batch_size=32, log_every=5, bn_images=64,
        cuts=["0", "1", "2"], checkpoint_every=10, device="cuda", precision="fp32", bridge="pca", deterministic=True,
    )  # fmt: skip
    digits = open_dataset("digits")

    def distil(name, **settings):
        teacher, student = small.pair().teacher, small.net(1, 2, dropout=0.3)
        given = dataclasses.replace(config, out=str(tmp_path / name), **settings)
        Distiller(given, teacher=teacher, student=student, dataset=digits).run(progress=False)

    distil("whole")
    after = Engine._after_step

    def breaking_off(engine, stage):
        after(engine, stage)
        if engine.progress.step == 20:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Engine, "_after_step", breaking_off)
        distil("broken")
    torch.cuda.manual_seed(99)
    distil("broken", resume=True)
    whole, broken = (load_tensors(tmp_path / name / "checkpoint.safetensors")[0] for name in ("whole", "broken"))
    assert [name for name in whole if not torch.equal(whole[name], broken[name])] == []
