"""Files of rows by another reader, locks that a living writer holds, and rows that were forged, exchanged or torn."""

import fcntl
import os
import struct
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from stablekd_fast.cache import store as store_module
from stablekd_fast.cache.disk import DiskBudget, locked
from stablekd_fast.cache.memory_rows import MemoryRows
from stablekd_fast.cache.shard import Part
from stablekd_fast.cache.store import RowStore
from stablekd_fast.errors import CacheError, CacheFull
from tests.cache.shard_reader import crc32c, read_shard

ROWS, ROW_BYTES = 25, 75 + 12
"""Of a shard of `filled`, and of its parts in bytes."""
SCALES, KEYS = 4096 + ROWS * 75, 4096 + ROWS * ROW_BYTES
CHECKSUMS = KEYS + 8 * ROWS


def test_the_checksum_is_the_published_one():
    """The check value of CRC-32C in RFC 3720 and in every catalogue."""
    assert crc32c(b"123456789") == 0xE3069283


def test_another_reader_finds_the_same_rows(filled, make_rows):
    found = {}
    for path in sorted(filled.glob("shard-*")):
        found |= read_shard(path)
    assert sorted(found) == list(range(100))
    for number, (parts, fits) in found.items():
        codes, scales = make_rows(torch.tensor([number]))
        assert fits, number
        assert np.array_equal(parts["rows"], codes[0].numpy()) and np.array_equal(parts["scales"], scales[0].numpy())


def patch(path: Path, *pieces: tuple[int, bytes]) -> None:
    with open(path, "r+b") as file:
        for offset, data in pieces:
            file.seek(offset)
            file.write(data)


def half_filled(folder, wanted, make_rows, count=9) -> Path:
    """A store whose writer died after `count` rows."""
    rows = torch.arange(count)
    with RowStore(folder, wanted, write=True, expected=ROWS) as store:
        store.put(rows, make_rows(rows))
    [path] = folder.glob(".shard-*")
    return path


def test_rows_whose_key_was_written_but_not_the_row_are_freed(tmp_path, wanted, make_rows):
    """Their parts are zeros, or those of the row before the crash: the key alone makes no row."""
    path = half_filled(tmp_path / "c" / "x", wanted, make_rows)
    keys = b"".join(struct.pack("<q", number) for number in (9, 10))
    patch(path, (KEYS + 8 * 9, keys))
    with RowStore(path.parent, wanted, write=True, expected=ROWS) as store:
        assert len(store) == 9 and store.present(torch.arange(12)).tolist() == [True] * 9 + [False] * 3
        rows = torch.arange(9, 25)
        store.put(rows, make_rows(rows))
        assert all(map(torch.equal, store.gather(torch.arange(25)), make_rows(torch.arange(25))))
    assert all(fits for shard in path.parent.glob("*shard-*") for _, fits in read_shard(shard).values())


def test_a_row_that_was_torn_in_the_middle_ends_what_is_kept(tmp_path, wanted, make_rows):
    path = half_filled(tmp_path / "c" / "x", wanted, make_rows)
    patch(path, (4096 + 5 * 75 + 70, b"\0\0\0\0\0"))
    with RowStore(path.parent, wanted, write=True, expected=ROWS) as store:
        assert store.present(torch.arange(9)).tolist() == [True] * 5 + [False] * 4


def test_two_rows_exchanged_whole_are_damaged(filled, wanted):
    """With their checksums, but not their numbers: the index still is what the manifest says it was."""
    path = filled / "shard-00001.safetensors"
    content = path.read_bytes()
    for offset, size in ((4096, 75), (SCALES, 12)):
        one, other = (content[offset + slot * size : offset + (slot + 1) * size] for slot in (2, 7))
        patch(path, (offset + 2 * size, other), (offset + 7 * size, one))
    keys = np.frombuffer(content, np.int64, ROWS, KEYS)
    with RowStore(filled, wanted) as store:
        for slot in (2, 7):
            with pytest.raises(CacheError, match=f"Row {keys[slot]} .* does not fit its checksum"):
                store.gather(torch.tensor([int(keys[slot])]))


def test_a_row_under_the_number_of_another_is_damaged(tmp_path, wanted, make_rows):
    """Keys exchanged in a shard that no manifest lists yet: only the row number in the checksum tells."""
    path = half_filled(tmp_path / "c" / "x", wanted, make_rows)
    patch(path, (KEYS, struct.pack("<qq", 1, 0)))
    assert not any(fits for number, (_, fits) in read_shard(path).items() if number < 2)
    with RowStore(path.parent, wanted, write=True, expected=ROWS) as store:
        assert len(store) == 0


def test_a_damaged_row_stays_damaged(filled, wanted):
    """It is read three times; a row that is whole is no less so for it."""
    path = filled / "shard-00000.safetensors"
    key = int(np.frombuffer(path.read_bytes(), np.int64, ROWS, KEYS)[3])
    patch(path, (4096 + 3 * 75, b"\x77"))
    with RowStore(filled, wanted) as store:
        for _ in range(3):
            with pytest.raises(CacheError, match=f"Row {key} "):
                store.gather(torch.tensor([key]))
        store.gather(torch.tensor([(key + 1) % 100]))


WRITER = """
import sys, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
from conftest import PARTS, SAMPLES, make_rows
from stablekd_fast.cache.manifest import Manifest
from stablekd_fast.cache.store import RowStore
wanted = Manifest(PARTS, SAMPLES, {{"teacher": "t1", "data": {{"name": "d", "images": 100}}}})
store = RowStore(Path({folder!r}), wanted, write=True, expected=25)
store.put(torch.arange(9), make_rows(torch.arange(9)))
print("written", flush=True)
sys.stdin.readline()
store.put(torch.arange(9, 25), make_rows(torch.arange(9, 25)))
store.close()
"""


def test_a_living_writer_keeps_its_shard(tmp_path, wanted, make_rows):
    """Another process writes elsewhere, although the shard has room; both end with what they stored."""
    folder = tmp_path / "c" / "x"
    script = WRITER.format(tests=str(Path(__file__).parent), folder=str(folder))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", script], **pipes) as living:
        assert living.stdout.readline() == "written\n"
        with RowStore(folder, wanted, write=True, expected=25) as other:
            assert not other._open, "it has taken up nothing"
            rows = torch.arange(50, 60)
            other.put(rows, make_rows(rows))
            assert len(list(folder.glob(".shard-*"))) == 2
            print(file=living.stdin, flush=True)
            assert living.wait(60) == 0
            other.refresh()
            assert len(other) == 35
            rows = torch.cat([torch.arange(25), rows])
            assert all(map(torch.equal, other.gather(rows), make_rows(rows)))


def test_two_fillers_share_one_budget(tmp_path, wanted, make_rows, monkeypatch):
    """The second one waits until the first has taken its room, and finds none left."""
    folder, size = tmp_path / "cache", 4096 + 25 * (ROW_BYTES + 12)
    monkeypatch.setattr(store_module, "_SMALLEST_SHARD", 25 * wanted.row_bytes)
    checked, go_on, outcome = threading.Event(), threading.Event(), []
    create = store_module.Shard.create

    def slow(path, parts, rows, column):
        if path.parent.name == "a":
            checked.set()
            assert go_on.wait(30)
        return create(path, parts, rows, column)

    def fill(name):
        with RowStore(folder / name, wanted, write=True, budget=size + 100, expected=25) as store:
            try:
                store.put(torch.arange(25), make_rows(torch.arange(25)))
                outcome.append((name, "stored"))
            except CacheFull:
                outcome.append((name, "refused"))

    monkeypatch.setattr(store_module.Shard, "create", staticmethod(slow))
    first, second = (threading.Thread(target=fill, args=(name,)) for name in "ab")
    first.start()
    assert checked.wait(30)
    second.start()
    second.join(0.5)
    waits = second.is_alive()
    go_on.set()
    first.join(30)
    second.join(30)
    assert waits and dict(outcome) == {"a": "stored", "b": "refused"}


def test_the_budget_is_locked_while_room_is_taken(tmp_path):
    with DiskBudget(tmp_path, 1000).room_for(10), open(tmp_path / ".lock", "w") as file:
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with locked(tmp_path):
        pass


def test_what_the_system_reads_and_writes_in_pieces_is_whole(tmp_path, wanted, make_rows, monkeypatch):
    """A signal or a network's file system may end a call early."""
    read, write = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda file, views, offset: read(file, [views[0][:50]], offset))
    monkeypatch.setattr(os, "pwrite", lambda file, view, offset: write(file, view[:70], offset))
    path = half_filled(tmp_path / "c" / "x", wanted, make_rows)
    assert sorted(read_shard(path)) == list(range(9))
    with RowStore(path.parent, wanted, write=True, expected=ROWS) as store:
        assert len(store) == 9 and store.verify() == 9
        assert all(map(torch.equal, store.gather(torch.arange(9)), make_rows(torch.arange(9))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.int8, torch.float8_e4m3fn, torch.bfloat16])
def test_rows_in_memory_fill_their_room_exactly(dtype):
    """What fits is stored; what does not is refused, once, and what was stored stays."""
    rows = MemoryRows([Part("rows", dtype, (4,))], 10, torch.device("cpu"))
    values = torch.arange(48).view(12, 4).to(dtype)
    rows.put(torch.arange(10), [values[:10]])
    assert len(rows) == 10, "exactly full is no error"
    with pytest.raises(CacheFull, match="All 10 rows"):
        rows.put(torch.tensor([3, 11]), [values[8:10]])
    assert rows.present(torch.tensor([9, 11, 3])).tolist() == [True, False, True]
    asked = torch.tensor([7, 0, 9])
    assert torch.equal(rows.gather(asked)[0].float(), values.float()[asked])


def test_a_row_beyond_a_table_of_one_row_is_not_there():
    rows = MemoryRows([Part("rows", torch.float32, (4,))], 10, torch.device("cpu"))
    assert rows.present(torch.tensor([0, 5])).tolist() == [False, False]
    rows.put(torch.tensor([0]), [torch.ones(1, 4)])
    assert rows.present(torch.tensor([0, 5])).tolist() == [True, False]


def test_of_two_damaged_rows_the_first_is_named(filled, wanted):
    path = filled / "shard-00000.safetensors"
    keys = torch.tensor(list(read_shard(path)))
    for slot in (5, 3):
        patch(path, (4096 + slot * 75, b"\x81\x81"))
    with RowStore(filled, wanted) as store, pytest.raises(CacheError, match=f"Row {keys[3]} "):
        store.gather(keys)


def test_a_file_that_was_cut_short_after_its_rows_were_seen(filled, wanted):
    """No checksum is compared again, so that the end of the file itself must be noticed."""
    path = filled / "shard-00000.safetensors"
    keys = torch.tensor(list(read_shard(path)))
    with RowStore(filled, wanted) as store:
        store.gather(keys)
        os.truncate(path, SCALES + 20 * 12)
        store.gather(keys[:20])
        with pytest.raises(CacheError, match=f"Row {keys[20]} .* cannot be read: the file ends too early"):
            store.gather(keys)


def test_the_core_itself_knows_a_row_that_is_not_stored(filled, wanted):
    """The store asks before; between its question and the reading a table could change."""
    absent = 1  # `Fault` in csrc/row_store.h
    with RowStore(filled, wanted) as store:
        store.tables.places[7] = -1
        rows, out, tables = torch.tensor([6, 7]), store.empty(2), store.tables.current()
        parts = [(part.bytes, tensor.data_ptr()) for part, tensor in zip(wanted.parts, out)]
        ticket = store.reader.submit(rows.data_ptr(), 2, *(table.data_ptr() for table in tables), parts, False)
        assert store.reader.wait(ticket)[:2] == (absent, 7)
