"""The Triton kernels compile for real chips without spills and with the wide accesses that they promise."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from stablekd_fast.bench.operators import aot, proof, traffic
from stablekd_fast.bench.operators.proof import compiled_rows
from stablekd_fast.cli import main
from stablekd_fast.errors import ConfigError
from stablekd_fast.kernels import _triton


def check(rows):
    assert {row["architecture"] for row in rows} == set(aot.ARCHITECTURES)
    faults = [row for row in rows if row["fault"]]
    assert not faults, faults[:3]


@pytest.fixture(scope="module")
def sample(request):
    """The rows of a sample for the operators whose tests were chosen: kernels that several of them use are compiled
    once, by processes that are started once."""
    here = [item for item in request.session.items if item.path == request.path]
    chosen = [item.callspec.params["op"] for item in here if "sample" in item.fixturenames]
    return list(compiled_rows(chosen, "each"))


@pytest.mark.parametrize("op", aot.operators())
def test_every_type_and_constant_for_every_chip(op, sample):
    """Each value once; that every two of them fit together takes minutes, and all variants hours: see below."""
    kernels = {listed.variant.kernel for _, listed in aot.reachable([op])}
    rows = [row for row in sample if row["kernel"] in kernels]
    check(rows)
    assert {row["kernel"] for row in rows} == kernels


@pytest.mark.slow
@pytest.mark.parametrize("sample", ["pairs", "every"])
@pytest.mark.parametrize("op", aot.operators())
def test_every_pair_and_every_variant(op, sample):
    check(list(compiled_rows([op], sample)))


@pytest.mark.parametrize("op", ["feature_mse", "quantize_rows"])
@pytest.mark.parametrize(("chosen", "covered"), [(aot.each, aot._values), (aot.covering, aot._pairs)])
def test_samples_cover_what_they_say(op, chosen, covered):
    jobs = aot.every([op])
    everything, sampled = (
        {(job[1].kernel, value) for job in some for value in covered(job)} for some in (jobs, chosen([op]))
    )
    assert everything == sampled
    assert len(chosen([op])) < len(jobs)


PLANTED = """
import json
from dataclasses import asdict
import torch, triton, triton.language as tl
from stablekd_fast.bench.operators import aot
from stablekd_fast.kernels._launch import Listed, variant

@triton.jit
def hoarding(x_at, y_at, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    first = tl.load(x_at + lanes)
    again = tl.load(x_at + lanes * 3)
    total = tl.sum(first * again, 0)
    tl.store(y_at + lanes, first * total + again)

@triton.jit
def narrow(x_at, y_at, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    tl.store(y_at + 3 * lanes, tl.load(x_at + 3 * lanes))

def listed(kernel, block):
    arguments = {"x_at": torch.float32, "y_at": torch.float32}
    return Listed(kernel, variant(kernel, arguments, {"BLOCK": block}, 1), wide_loads=True, wide_stores=True)

print(json.dumps([aot.compile_one("planted", listed(*one), 90).fault for one in ((hoarding, 8192), (narrow, 512))]))
"""


def test_spills_and_narrow_accesses_are_found(tmp_path):
    script = tmp_path / "planted.py"
    script.write_text(PLANTED)
    words = [sys.executable, str(script)]
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    found = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert found.returncode == 0, found.stderr
    spilled, narrow = json.loads(found.stdout)
    assert spilled.startswith("spills") and narrow.startswith("promises loads of 128 bits")


def test_the_command_prints_and_keeps_the_proof(tmp_path, capsys):
    out = tmp_path / "proof.json"
    assert main(["bench", "kernels", "--aot", "--ops", "dequantize_rows", "--json", str(out)]) == 0
    document = json.loads(out.read_text())
    assert {row["op"] for row in document["compiled"] + document["traffic"]} == {"dequantize_rows"}
    assert {"machine", "versions", "settings"} <= set(document)
    assert "dequantize_elements" in capsys.readouterr().out
    assert main(["bench", "kernels", "--aot", "--ops", "dequantise_rows"]) == 2
    assert "the nearest is 'dequantize_rows'" in capsys.readouterr().err


def test_a_broken_promise_is_an_exit_code(monkeypatch, capsys):
    monkeypatch.setattr(proof, "compiled_rows", lambda *_: [])  # the promise is one of bytes
    monkeypatch.setattr(traffic, "LIMIT", 0.5)
    assert main(["bench", "kernels", "--aot", "--ops", "dequantize_rows"]) == 1
    assert "moves 1.000 times the least bytes" in capsys.readouterr().err


def test_what_cannot_be_compiled_is_said(monkeypatch):
    with pytest.raises(ConfigError, match="no Triton kernel of an operator 'kd_los'.*kd_loss"):
        aot.check_operators(["kd_los"])
    monkeypatch.setattr(_triton, "missing", "Triton is not installed")
    with pytest.raises(ConfigError, match="Triton is not installed"):
        aot.check_operators([])
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ConfigError, match="TRITON_INTERPRET=1 is set"):
        list(aot.compiled([]))
