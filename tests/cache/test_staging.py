"""A batch's rows of all columns: gathered by one job into one piece of memory, which goes to the device as one."""

import pytest
import torch

from stablekd_fast.cache import memory_rows
from stablekd_fast.cache.memory_rows import Gatherer, MemoryRows
from stablekd_fast.cache.shard import Part
from stablekd_fast.cache.staging import Staging
from stablekd_fast.errors import CacheError

CPU, CAPACITY = torch.device("cpu"), 10
FLOATS = (Part("rows", torch.float32, (4,)),)
CODES = (Part("rows", torch.int8, (3, 5)), Part("scales", torch.float32, (3,)))
PRECISE = (Part("rows", torch.float8_e4m3fn, (7,)), Part("rest", torch.bfloat16, ()))


def values_of(part: Part, numbers: torch.Tensor) -> torch.Tensor:
    """What is stored under these row numbers: small numbers that each type has."""
    values = numbers[:, None] + torch.arange(max(part.bytes // part.dtype.itemsize, 1))
    return values.to(part.dtype).view(len(numbers), *part.shape)


def column(parts, numbers) -> MemoryRows:
    """Rows with these numbers, in this order."""
    rows = MemoryRows(parts, CAPACITY, CPU)
    rows.put(torch.tensor(numbers), [values_of(part, torch.tensor(numbers)) for part in parts])
    return rows


@pytest.fixture(params=["core", "torch"])
def gatherer(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(memory_rows, "core", None)
    made = Gatherer()
    yield made
    made.close()


def test_rows_of_all_columns_are_gathered_at_once_while_further_ones_are_stored(gatherer):
    """Each column has its rows in an order of its own."""
    kinds = {0: FLOATS, 1: CODES, 4: PRECISE}
    columns = {0: column(FLOATS, [7, 3, 5]), 1: column(CODES, [5, 7, 3, 1]), 4: column(PRECISE, [3, 5, 7])}
    wanted = torch.tensor([5, 7, 7, 3])
    staging = Staging(kinds, len(wanted))
    gathering = gatherer.submit([(rows, wanted, staging.parts[k]) for k, rows in columns.items()])
    columns[0].put(torch.tensor([1]), [values_of(FLOATS[0], torch.tensor([1]))])
    gatherer.wait(gathering)
    for k, parts in kinds.items():
        for part, found in zip(parts, staging.parts[k], strict=True):
            assert found.is_contiguous() and torch.equal(found.float(), values_of(part, wanted).float()), (k, part)


def test_many_rows_are_gathered_by_several_threads(gatherer):
    part = Part("rows", torch.float32, (4096,))
    rows = MemoryRows([part], 500, CPU)
    numbers = torch.randperm(500)
    rows.put(numbers, [values_of(part, numbers)])
    wanted = torch.randint(0, 500, (300,))
    staging = Staging({0: [part]}, 300)
    gatherer.wait(gatherer.submit([(rows, wanted, staging.parts[0])]))
    assert torch.equal(staging.parts[0][0], values_of(part, wanted))


def test_tensors_lie_in_one_piece_one_behind_the_other_where_a_gpu_begins_them():
    staging = Staging({2: CODES, 0: FLOATS}, 3)
    first, scales, floats = *staging.parts[2], *staging.parts[0]
    start = first.data_ptr()
    assert [tensor.data_ptr() - start for tensor in (first, scales, floats)] == [0, 512, 1024]
    assert len({tensor.untyped_storage().data_ptr() for tensor in (first, scales, floats)}) == 1


def test_what_was_gathered_goes_to_another_device_as_one():
    """The meta device copies nothing, but views of one piece are views of one there too."""
    staging = Staging({0: FLOATS, 1: CODES}, 3)
    assert staging.on(CPU) is staging.parts, "on a CPU nothing is copied"
    there = staging.on(torch.device("meta"))
    assert {k: [(x.shape, x.dtype) for x in parts] for k, parts in there.items()} == {
        k: [(x.shape, x.dtype) for x in parts] for k, parts in staging.parts.items()
    }
    pieces = [x for parts in there.values() for x in parts]
    assert {x.untyped_storage().nbytes() for x in pieces} == {3 * 512}, "each is a view of the whole"
    assert [x.storage_offset() * x.itemsize for x in pieces] == [0, 512, 1024]


def test_nothing_is_staged_of_no_column_and_of_no_row():
    assert Staging({}, 4).parts == {}
    assert Staging({0: CODES}, 0).parts[0][0].shape == (0, 3, 5)


def test_a_row_that_is_not_there_is_an_error_where_it_is_waited_for():
    rows, gatherer = column(FLOATS, [0, 2]), Gatherer()
    gathering = gatherer.submit([(rows, torch.tensor([0, 1]), Staging({0: FLOATS}, 2).parts[0])])
    with pytest.raises(CacheError, match="Row 1 of a batch is not stored"):
        gatherer.wait(gathering)
    gatherer.close()


@pytest.mark.parametrize(
    "out",
    [torch.empty(1, 4, dtype=torch.float64), torch.empty(2, 4), torch.empty(1, 3), torch.empty(1, 8)[:, ::2]],
    ids=["type", "count", "shape", "strides"],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(gatherer, out):
    rows = column(FLOATS, [0])
    with pytest.raises(CacheError, match="were to be gathered into"):
        gatherer.submit([(rows, torch.tensor([0]), [out])])


def test_a_gathering_that_nobody_waits_for_ends_before_its_memory_goes():
    part = Part("rows", torch.float32, (1 << 16,))
    rows = MemoryRows([part], 64, CPU)
    rows.put(torch.arange(64), [values_of(part, torch.arange(64))])
    gatherer = Gatherer()
    gatherer.submit([(rows, torch.arange(64), Staging({0: [part]}, 64).parts[0])])
    (kept,) = gatherer._waiting.values()
    gatherer.close()
    assert gatherer._waiting == {} and torch.equal(kept.tensors[2], values_of(part, torch.arange(64)))
