"""What a step gives a device to do: kernels for each operation, bytes, and what a captured graph repeats."""

from collections import Counter

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from stablekd_fast import kernels
from stablekd_fast.bench.standin import Shipment, counting
from stablekd_fast.bench.standin.kernel_table import work_of
from stablekd_fast.execution.capture import make_runner

GPU = torch.device("cuda", 0)
MAP = (8, 16, 4, 4)
SIZE = 4 * 8 * 16 * 4 * 4
"""Bytes of such a map in float32."""


def on_gpu(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device=GPU)


def counted(*asks):
    with counting() as budget:
        operands = [ask() for ask in asks[1:]]
        return budget.of(lambda: asks[0](*operands))


def total(works):
    kinds = Counter()
    for work in works:
        kinds[work.kind] += work.kernels
    return dict(kinds)


def normed(x, training):
    weights = [torch.ones(16, device=GPU) for _ in range(4)]
    return torch.ops.aten.native_batch_norm(x, weights[0], weights[1], weights[2], weights[3], training, 0.1, 1e-5)


@pytest.mark.parametrize("training, launched, passes", [(True, 4, 3), (False, 3, 2)])
def test_a_norm_in_training_reads_its_input_twice_and_is_four_kernels(training, launched, passes):
    with counting() as budget:
        x = on_gpu(*MAP)
        (work,) = [work for work in budget.of(lambda: normed(x, training)) if work.kind == "norms"]
    assert work.kernels == launched
    assert passes * SIZE < work.moved < passes * SIZE + 16 * 4 * 10


@pytest.mark.parametrize(
    "needs, launched", [([True, True, False], 4), ([False, True, False], 3), ([True, False, False], 1)]
)
def test_a_convolution_s_backward_pass_is_what_it_is_asked_for(needs, launched):
    def backward(x, weight, gradient):
        arguments = (gradient, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, needs)
        return torch.ops.aten.convolution_backward(*arguments)

    (work,) = counted(backward, lambda: on_gpu(*MAP), lambda: on_gpu(16, 16, 3, 3), lambda: on_gpu(*MAP))
    assert (work.kind, work.kernels) == ("convolutions", launched)
    assert work.flops == sum(needs) * 2 * 8 * 16 * 4 * 4 * 16 * 9


@pytest.mark.parametrize(
    "ask, tensors, launched",
    [
        (lambda a, b: torch._foreach_add(a, b, alpha=0.1), 48, 1),
        (lambda a, b: torch._foreach_add(a, b, alpha=0.1), 49, 2),
        (lambda a, b: torch._foreach_add_(a, b), 64, 1),
        (lambda a, b: torch._foreach_add_(a, b), 65, 2),
        (lambda a, b: torch._foreach_mul_(a, b[0][0]), 110, 1),
        (lambda a, b: torch._foreach_mul_(a, b[0][0]), 111, 2),
    ],
)
def test_one_kernel_takes_many_tensors(ask, tensors, launched):
    def lists():
        return [on_gpu(4) for _ in range(tensors)]

    assert total(counted(ask, lists, lists)) == {"optimizer": launched}


def test_one_kernel_takes_so_many_elements():
    large = 321 * 65536
    assert total(counted(lambda x: torch._foreach_add_([x], 1.0), lambda: on_gpu(large))) == {"optimizer": 2}


def test_rows_that_are_gathered_are_read_not_their_whole_table():
    (work,) = counted(
        lambda table, rows: table.index_select(0, rows), lambda: on_gpu(1000, 16), lambda: on_gpu(8, dtype=torch.int64)
    )
    assert (work.kind, work.moved) == ("copies", 2 * 8 * 16 * 4 + 8 * 8)


@pytest.mark.parametrize(
    "ask, kind, maps",
    [
        (lambda x: x.copy_(torch.empty_like(x)), "copies", 2),
        (lambda x: x.zero_(), "copies", 1),
        (lambda x: x.add_(1), "elementwise", 2),
        (lambda x: x + x, "elementwise", 3),
        (lambda x: x.to(torch.bfloat16), "copies", 1.5),
        (lambda x: torch.mul(x, 2, out=x), "elementwise", 2),
    ],
)
def test_each_operand_is_read_and_each_result_written_once(ask, kind, maps):
    (work,) = counted(ask, lambda: on_gpu(*MAP))
    assert (work.kind, work.kernels, work.moved) == (kind, 1, maps * SIZE)


def test_views_and_empty_memory_are_no_work():
    assert not counted(
        lambda x: (x.view(-1), x[0], x.unbind(), x.transpose(0, 1), torch.empty_like(x)), lambda: on_gpu(*MAP)
    )


def test_an_operator_of_ours_is_what_its_launches_are():
    """With a given power: one kernel over both maps, one that adds up."""

    def loss(student, target):
        return torch.ops.stablekd.feature_mse_with_grad(student, target, None, None, None, 1, 1.0, None)

    found = counted(loss, lambda: on_gpu(*MAP), lambda: on_gpu(*MAP))
    if kernels.implementations()["feature_mse"]["cuda"] == "Triton":
        assert total(found) == {"ours": 2}
        assert found[0].moved == pytest.approx(3 * SIZE, rel=0.01)
    else:
        assert "ours" not in total(found) and found


def test_what_is_captured_counts_at_each_replay_and_at_no_other_time():
    with counting() as budget:
        x = on_gpu(*MAP)
        runner = make_runner("cudagraph", [lambda: x.add_(1), lambda: x.mul_(2)], [x], GPU, fall_back=False)
        assert total(budget.of(lambda: None)) == {}
        assert total(budget.of(runner.run)) == {"elementwise": 2}
        assert not budget.work
        assert total(budget.of(lambda: (runner.run(), x.zero_(), runner.run()))) == {"elementwise": 4, "copies": 1}
        assert [work.kind for work in budget.work] == ["copies"], "what is outside of graphs"


def test_what_is_shipped_is_told_by_memory_and_stream():
    with counting() as budget:
        pinned, pageable = torch.ones(1024, pin_memory=True), torch.ones(512)

        def ship():
            pinned.to(GPU, non_blocking=True)
            with torch.cuda.stream(torch.cuda.Stream(GPU)):
                pinned.to(GPU, non_blocking=True)
            pageable.to(GPU)
            pinned.copy_(torch.ones(1024, device=GPU), non_blocking=True)

        budget.of(ship)
        assert budget.shipments == {
            Shipment(True, True, False): 4096,
            Shipment(True, True, True): 4096,
            Shipment(True, False, False): 2048,
            Shipment(False, True, False): 4096,
        }


def test_what_is_done_on_another_stream_is_told_apart():
    with counting() as budget:
        x, side = on_gpu(*MAP), torch.cuda.Stream(GPU)
        runners = [make_runner("cudagraph", [body], [x], GPU, fall_back=False) for body in (x.sin_, x.zero_)]

        def step():
            x.mul_(2)
            runners[0].run()
            with torch.cuda.stream(side):
                torch.empty_like(x).copy_(x)
                runners[1].run()

        for _ in range(2):
            assert total(budget.of(step)) == {"elementwise": 2, "copies": 2}
            assert total(budget.beside) == {"copies": 2}


def test_an_operator_of_ours_does_not_change_which_stream_computes():
    """Its launches are looked at on the stream of a capture."""
    with counting() as budget:
        a, pinned = on_gpu(*MAP), torch.ones(8, pin_memory=True)

        def step():
            with torch.cuda.stream(torch.cuda.Stream(GPU)):
                torch.ops.stablekd.feature_mse_with_grad(a, a, None, None, None, 1, 1.0, None)
            pinned.to(GPU, non_blocking=True)

        budget.of(step)
        assert list(budget.shipments) == [Shipment(True, True, False)]


def test_an_operation_that_nobody_named_is_one_elementwise_kernel():
    with FakeTensorMode():
        x = torch.empty(*MAP)
        work = work_of(torch.ops.aten.erf.default, (x,), {}, x)
    assert (work.kind, work.kernels) == ("elementwise", 1)
