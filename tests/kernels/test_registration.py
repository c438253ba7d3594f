"""How operators are found and registered."""

import subprocess
import sys
from pathlib import Path

from stablekd_fast import kernels
from stablekd_fast.kernels import _native

ROOT = Path(__file__).resolve().parents[2]


def test_top_level_import_is_refused():
    run = subprocess.run([sys.executable, "-c", "import kernels"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode != 0
    assert "ImportError" in run.stderr and "import stablekd_fast.kernels" in run.stderr


def test_implementations_say_what_runs_and_why():
    table = kernels.implementations()
    assert {name.removesuffix("_backward") for name in table} == {*kernels.__all__} - {"implementations"}
    assert all(entry["reason"] for entry in table.values())
    if _native.core is None:
        assert table["augment_batch"]["cpu"] == "reference" and table["augment_batch"]["reason"] == _native.reason
    else:
        by_reference = {name for name, entry in table.items() if not entry["cpu"].startswith("C++ core")}
        assert by_reference == {
            "conv_act",
            *(f"{loss}{form}" for loss in ("correlation", "standardised_kd_loss") for form in ("", "_with_grad")),
        }
    assert table["conv_act"]["cpu"] == "reference" and table["conv_act"]["cuda"] == "cuDNN"
