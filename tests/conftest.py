"""What holds for all tests: which run where, in how many processes, and how many examples hypothesis tries."""

import os
from pathlib import Path

WORKER = "PYTEST_XDIST_WORKER" in os.environ
# Read when torch is imported, and by the processes that tests start. Threads that spin while they wait for one whose
# core is taken by another process use ten times the processor. Workers share the cores: one thread each is best.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if WORKER:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

if not torch.cuda.is_available():
    # Read when Triton is first imported, which torch does for reasons of its own.
    os.environ["TRITON_INTERPRET"] = "1"

settings.register_profile("few", max_examples=12, deadline=None, derandomize=True, database=None)
settings.load_profile("few")

LONG = ("distributed", "aot", "package")
"""Folders whose files take minutes: were one of them the last, the other worker would wait for it."""


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Whole folders are tested by two workers, file by file, as if `-n 2 --dist loadfile` were given.

    One process serves where a file or a test is named, where a debugger or the output is asked for, where `-n` is
    given, and where there is a GPU: its memory and its time are measured.
    """
    chosen = getattr(config.option, "numprocesses", 0)  # None: xdist is there and was told nothing
    by_hand = config.option.usepdb or config.option.trace or config.option.capture == "no"
    whole = all(Path(config.invocation_params.dir, argument).is_dir() for argument in config.args)
    alone = WORKER or torch.cuda.is_available() or os.cpu_count() == 1
    if whole and not alone and not by_hand and chosen is None:
        config.option.numprocesses, config.option.dist, config.option.loadscopereorder = 2, "loadfile", False


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
    if WORKER:
        items.sort(key=lambda item: item.path.parent.name not in LONG)


@pytest.fixture(scope="session")
def digits_file(tmp_path_factory):
    """The digits, for `torch.load` in processes that tests start: scikit-learn, which has them, is slow to import."""
    from stablekd_fast.data import open_dataset

    path = tmp_path_factory.mktemp("data") / "digits.pt"
    torch.save(open_dataset("digits"), path)
    return path


@pytest.fixture
def one_thread():
    """Networks of tests are no faster with more, and where another process needs a core they are far slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
