"""What is decided for the user from the machine at hand."""

import os

import pytest
import torch

from stablekd_fast.config import DistillConfig
from stablekd_fast.report.progress import _data
from stablekd_fast.run import builders
from stablekd_fast.run.builders import decoding_threads

CPU = torch.device("cpu")


@pytest.fixture
def one_core():
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


def test_a_thread_decodes_for_each_core_of_the_process():
    assert decoding_threads(DistillConfig().workers, CPU) == len(os.sched_getaffinity(0))


def test_cores_that_the_process_may_not_use_do_not_count(one_core):
    assert decoding_threads(DistillConfig().workers, CPU) == 1


@pytest.mark.parametrize("asked", [0, 1, 7])
def test_what_is_asked_for_is_taken(asked):
    assert decoding_threads(DistillConfig(workers=asked).workers, CPU) == asked


@pytest.mark.parametrize("device, cores, threads", [("cuda", 16, 4), ("cuda", 2, 1), ("cpu", 16, 16)])
def test_processes_with_a_gpu_each_share_the_cores_of_their_host(monkeypatch, device, cores, threads):
    """Those that train on processors have been given their own cores before."""
    monkeypatch.setattr(builders, "usable_cores", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert decoding_threads(DistillConfig().workers, torch.device(device)) == threads


def test_the_threads_are_told_where_images_are_decoded():
    event = {"name": "tree", "classes": 10, "training_images": 5, "held_out": 0, "test_images": 2}
    assert _data(event | {"decoding_threads": 3}).endswith("2 test, decoded by 3 threads")
    assert _data(event | {"decoding_threads": None}).endswith("2 test") and _data(event).endswith("2 test")
