"""Every test of an operator runs once per instruction set level that the core has on this processor."""

import pytest
import torch

from stablekd_fast.kernels._native import core

LEVELS = ["baseline", "avx2", "avx512"]


@pytest.fixture(scope="module", autouse=True, params=LEVELS)
def level(request):
    if core is None:
        if request.param != LEVELS[0]:
            pytest.skip("the C++ core is not built; the reference was tested already")
        yield "reference"
        return
    if request.param not in core.levels():
        pytest.skip(f"this processor has no {request.param}")
    best = core.level()
    core.use_level(request.param)
    yield request.param
    core.use_level(best)


@pytest.fixture(scope="module", autouse=True)
def two_threads():
    """Operators are tested as they run by default, in parallel, also where this process is one of several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)
