"""Triton kernels on the device where there is one, and otherwise by Triton's interpreter on the CPU.

Triton decides when a kernel is defined, so the interpreter is switched on before the first of them is imported.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def launches():
    """The variants launched during the test."""
    from stablekd_fast.kernels import _launch

    seen = set()
    _launch.watchers.append(seen.add)
    yield seen
    _launch.watchers.remove(seen.add)
