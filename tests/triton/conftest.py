"""Triton kernels run on the GPU where there is one, otherwise by Triton's interpreter on CPU tensors.

See tests/conftest.py.
"""

from functools import cache

import pytest
import torch


@pytest.fixture(scope="session")
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session", autouse=True)
def rounding_as_on_chips():
    """Chips round to the nearest bfloat16; Triton's interpreter cuts the lower bits off."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    original = interpreter._convert_float

    def convert(values, source, target, mode):
        if (source.name, target.name) != ("fp32", "bf16"):
            return original(values, source, target, mode)
        rounded = torch.from_numpy(values.reshape(-1).copy()).bfloat16()
        return rounded.view(torch.int16).numpy().view("uint16").reshape(values.shape)

    interpreter._convert_float = convert
    yield
    interpreter._convert_float = original


@pytest.fixture(autouse=True)
def launches(request):
    """The variants launched by the test, which the `specialisations()` of the test module's `kernels` must list.

    `kernels` is one module or a tuple of them.
    """
    from stablekd_fast.kernels import _launch

    seen = []
    watch = seen.append
    _launch.watchers.append(watch)
    yield seen
    _launch.watchers.remove(watch)
    kernels = getattr(request.module, "kernels", None)
    if kernels is not None:
        assert set(seen) <= _listed(kernels)


@cache
def _listed(kernels):
    modules = kernels if isinstance(kernels, tuple) else (kernels,)
    return {entry.variant for module in modules for entry in module.specialisations()}
