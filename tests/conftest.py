"""What holds for all tests: which of them run where, and how many examples hypothesis tries."""

import os

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    # Read when Triton is first imported, which torch does for reasons of its own.
    os.environ["TRITON_INTERPRET"] = "1"

settings.register_profile("few", max_examples=12, deadline=None, derandomize=True, database=None)
settings.load_profile("few")


def pytest_collection_modifyitems(config, items):
    from stablekd_fast.data.dali import dali_missing  # not above: the variable must be set before Triton is imported

    chosen = config.getoption("markexpr")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if "dali" in item.keywords and dali_missing():
            item.add_marker(pytest.mark.skip(reason=dali_missing()))
        if "slow" in item.keywords and "slow" not in chosen:
            item.add_marker(pytest.mark.skip(reason="takes minutes; run with `pytest -m slow`"))


@pytest.fixture
def one_thread():
    """Networks of tests are no faster with more, and where another process needs a core they are far slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
