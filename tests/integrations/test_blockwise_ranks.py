"""Blockwise in DistributedDataParallel, by two real processes."""

import json
import socket
from pathlib import Path

import pytest
import torch
from torch import nn

from stablekd_fast import Blockwise
from stablekd_fast.errors import RankError
from tests.processes import Forked


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the first of the processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    meeting = {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    words = Path(__file__).with_name("ranks.py"), folder / "found.json", folder / "rows"
    processes = [Forked(*words, environment={**meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in (0, 1)]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert not any(process.returncode for process in processes), outputs
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("student", ["plain", "norms"])
def test_two_processes_train_as_the_engine_does(found, student):
    """A student without batch norms as one process on whole batches; one with them as two ranks of the engine."""
    losses, weights, moved = found[student]
    assert losses < 1e-9 and weights < 1e-9 and moved > 0.01


def test_two_processes_share_rows(found):
    """After the first of three epochs each reads what either has stored; a batch or two may come too early for that,
    and one is looked at for the form of rows."""
    (live, ran), (kept, ran_with_rows) = found["rows"]
    torch.testing.assert_close(kept, live, rtol=1e-4, atol=1e-5)
    assert ran == 1 and 1 / 3 < ran_with_rows < 0.4


def test_gradients_that_nobody_averages_are_refused(small_net, random_batch, monkeypatch):
    images, labels = random_batch(0)
    skd = Blockwise(small_net(2, 0), small_net(1, 1), images, 2)
    skd.begin(0)
    for name, value in (("is_initialized", True), ("get_world_size", 2)):
        monkeypatch.setattr(torch.distributed, name, lambda *group, value=value: value)
    with pytest.raises(RankError, match="wrap Blockwise in DistributedDataParallel"):
        skd(images, labels)
    with torch.no_grad():
        assert isinstance(skd.eval()(images), torch.Tensor) and isinstance(skd.student, nn.Module)
