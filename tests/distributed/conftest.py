import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SETTINGS = {"OMP_NUM_THREADS": "1"}
"""What the processes find in their environment besides that of the test."""


def torchrun(ranks: int, *arguments: object, restarts: int = 0) -> subprocess.Popen:
    """Real processes, started as a user starts them."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        ranks,
        "--max-restarts",
        restarts,
    ]
    return _popen([*command, "--monitor-interval", 0.1, HERE / "worker.py", *arguments], SETTINGS)


def alone(*arguments: object) -> subprocess.Popen:
    return _popen([sys.executable, HERE / "worker.py", *arguments], SETTINGS)


def by_hand(ranks: int, *arguments: object) -> list[subprocess.Popen]:
    """Processes without an agent that ends all of them when one ends."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    meeting = {**SETTINGS, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    return [
        _popen(
            [sys.executable, HERE / "worker.py", *arguments], {**meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        )
        for rank in range(ranks)
    ]


def _popen(command: list, environment: dict) -> subprocess.Popen:
    return subprocess.Popen(
        [str(word) for word in command],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(process: subprocess.Popen, timeout: float = 240) -> str:
    """The output of a process when it has ended; fails if the process did."""
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="session", name="launch")
def launch_fixture(digits_file):
    SETTINGS["DIGITS"] = str(digits_file)
    return torchrun, alone, by_hand, finished
