"""Every test of an operator runs once per instruction set level that the core has on this processor."""

import pytest
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
