"""Where the C++ core is built with sanitizers (`.ci/sanitize`), it is that core which is tested, and it stops."""

import os
import subprocess
import sys

import pytest

from stablekd_fast.kernels import _native

FOLDER = os.environ.get("STABLEKD_SANITIZED")
OUT_OF_BOUNDS = """
import torch
from stablekd_fast.kernels._native import core
data = torch.zeros(100, dtype=torch.uint8)
core.crc32c(data.data_ptr(), 100 + 4096)
"""


@pytest.mark.skipif(FOLDER is None, reason="the C++ core is not built with sanitizers; .ci/sanitize builds it so")
def test_rows_read_out_of_bounds_end_the_process():
    assert _native.core is not None and _native.core.__file__.startswith(FOLDER)
    found = subprocess.run([sys.executable, "-c", OUT_OF_BOUNDS], capture_output=True, text=True, cwd="/")
    assert found.returncode and "AddressSanitizer: heap-buffer-overflow" in found.stderr
