"""The Triton kernels move hardly more bytes than their operators have to."""

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from stablekd_fast.bench.operators import traffic
from stablekd_fast.bench.operators.aot import operators

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="bytes are counted by Triton's interpreter"),
    # NumPy, which interprets the kernels, remarks on lanes whose values are never used.
    pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow) encountered:RuntimeWarning"),
]


@pytest.mark.parametrize("case", list(traffic.cases()), ids=lambda case: f"{case.op} {case.name}")
def test_bytes_moved(case):
    found = traffic.count(case)
    assert 1 <= found.ratio <= traffic.LIMIT


def test_every_operator_has_a_case():
    assert {case.op for case in traffic.cases()} == set(operators())


@triton.jit
def copy(x_at, y_at, count, TIMES: tl.constexpr, BLOCK: tl.constexpr):
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for _ in tl.static_range(TIMES):
        total += tl.load(x_at + lanes, mask=lanes < count, other=0.0)
    tl.store(y_at + lanes, total, mask=lanes < count)


@pytest.mark.parametrize("times", [1, 2])
def test_lanes_behind_the_end_are_not_counted_and_second_reads_are(times):
    x, y = torch.ones(100), torch.empty(100)
    with traffic.counted() as counter:
        copy[(4,)](x, y, 100, TIMES=times, BLOCK=32)
    assert counter.moved == 100 * 4 * (times + 1)
    copy[(4,)](x, y, 100, TIMES=times, BLOCK=32)
    assert counter.moved == 100 * 4 * (times + 1)
