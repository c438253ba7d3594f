"""A claim on two GPUs: gradients are averaged inside a captured step."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import torch

from stablekd_fast.selftest.claim import Broken, Claim, NotHere

_SECONDS = 60


def _averages(device: torch.device) -> str:
    if device.type != "cuda" or torch.cuda.device_count() < 2:
        raise NotHere("needs two GPUs")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    meeting = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    command = [sys.executable, "-c", f"from {__name__} import rank; rank()"]
    processes = [
        subprocess.Popen(
            command, env={**meeting, "RANK": number, "LOCAL_RANK": number}, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )
        for number in ("0", "1")
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=_SECONDS)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for output in outputs:
        lines = output.strip().splitlines() or ["nothing"]
        if lines[-1] != json.dumps([1.5, 3.0]):
            raise Broken(f"a rank printed {lines[-1]} instead of means of 1.5 and 3.0")
    return "means of two ranks, 1.5 and 3.0, by NCCL in a graph"


def rank() -> None:
    """Average inside a graph, replay it on other values, and print both means: what each of the two processes runs."""
    from stablekd_fast.distributed import Layout, join
    from stablekd_fast.execution.capture import make_runner

    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    ranks = join(device, float(_SECONDS))
    averaging = Layout(1, 2, (0,)).averaging(ranks, device)
    assert averaging is not None
    values = torch.zeros(1 << 16, device=device)
    runner = make_runner("cudagraph", [lambda: averaging.average([values])], [values], device, fall_back=False)
    means = []
    for factor in (1, 2):
        values.fill_(factor * (1 + ranks.rank))
        runner.run()
        means.append(values.mean().item())
    runner.close()
    print(json.dumps(means), flush=True)


RANKS = [Claim("two ranks average inside a captured step", _averages, "two processes by NCCL, two replays")]
