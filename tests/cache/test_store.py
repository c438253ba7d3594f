import json
import threading
from pathlib import Path

import pytest
import safetensors
import torch

from stablekd_fast.cache.manifest import Manifest
from stablekd_fast.cache.shard import Part
from stablekd_fast.cache.store import RowStore
from stablekd_fast.errors import CacheError, CacheFull
from stablekd_fast.kernels._native import core
from tests.processes import Forked


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*shard*"))


def assert_rows(store: RowStore, rows: torch.Tensor, make_rows) -> None:
    for found, expected in zip(store.gather(rows), make_rows(rows)):
        assert torch.equal(found, expected)


def test_rows_come_back_in_the_order_asked_for(filled, wanted, make_rows):
    with RowStore(filled, wanted) as store:
        assert len(store) == 100
        assert_rows(store, torch.tensor([99, 0, 7, 7, 42]), make_rows)
        assert_rows(store, torch.arange(100).flip(0), make_rows)
        assert_rows(store, torch.empty(0, dtype=torch.int64), make_rows)
    assert names(filled) == [f"shard-0000{i}.safetensors" for i in range(4)]


def test_shards_are_plain_safetensors_with_data_at_4096(filled, make_rows):
    for path in filled.glob("shard-*"):
        with safetensors.safe_open(path, "pt") as file:
            keys = file.get_tensor("keys")
            for name, expected in zip(("rows", "scales"), make_rows(keys)):
                assert torch.equal(file.get_tensor(name), expected)
        assert path.read_bytes()[4096 : 4096 + 75] == make_rows(keys[:1])[0].numpy().tobytes()


def test_writers_side_by_side_take_up_what_the_others_store(tmp_path, wanted, make_rows):
    folder = tmp_path / "c" / "shared"
    even, odd = torch.arange(0, 100, 2), torch.arange(1, 100, 2)
    with RowStore(folder, wanted, write=True) as one, RowStore(folder, wanted, write=True) as other:
        one.put(even[:7], make_rows(even[:7]))
        other.put(odd, make_rows(odd))
        assert not other.present(even).any()
        other.refresh()
        assert other.present(even).tolist() == [True] * 7 + [False] * 43, "rows of a shard that is still written"
        one.put(even[7:], make_rows(even[7:]))
        for store in (one, other):
            store.refresh()
            assert len(store) == 100
            assert_rows(store, torch.arange(100), make_rows)
    with RowStore(folder, wanted, write=True) as store:
        assert len(store) == 100


def test_a_row_that_is_not_stored_is_named(filled, make_rows):
    with RowStore(filled) as store:
        assert store.present(torch.tensor([5, 100, 5000])).tolist() == [True, False, False]
        with pytest.raises(CacheError, match=r"Row 103 \(sample 3, view 1\) is not stored"):
            store.gather(torch.tensor([1, 103]))


def test_more_views_add_shards_and_rows_once_stored_stay(filled, make_rows):
    before = {path.name: path.read_bytes() for path in filled.glob("shard-*")}
    rows = torch.arange(80, 150)
    with RowStore(filled, write=True, expected=150) as store:
        other = [torch.zeros_like(part) for part in make_rows(rows)]
        store.put(
            rows,
            [torch.where((rows < 100).view(-1, *[1] * (p.dim() - 1)), o, p) for o, p in zip(other, make_rows(rows))],
        )
        store.put(torch.tensor([120, 120]), make_rows(torch.tensor([120, 120])))
    with RowStore(filled) as store:
        assert_rows(store, torch.arange(150), make_rows)
    assert before.items() <= {path.name: path.read_bytes() for path in filled.glob("shard-*")}.items()


def test_a_shard_holds_no_more_than_is_expected(tmp_path, wanted, make_rows):
    with RowStore(tmp_path / "c" / "x", wanted, write=True, expected=40) as store:
        store.put(torch.arange(0, 80, 2), make_rows(torch.arange(0, 80, 2)))
    assert store.manifest.shards["shard-00000.safetensors"]["rows"] == 40


def test_a_store_that_is_not_full_is_filled_by_the_next_writer(tmp_path, wanted, make_rows):
    folder = tmp_path / "c" / "x"
    with RowStore(folder, wanted, write=True) as store:
        store.put(torch.arange(30), make_rows(torch.arange(30)))
        assert_rows(store, torch.arange(30), make_rows)  # readable while its shard is being written
    assert names(folder) == [".shard-00000.safetensors"]
    with RowStore(folder, wanted) as store:
        assert_rows(store, torch.arange(30), make_rows)  # for a reader too
    with RowStore(folder, wanted, write=True) as store:
        assert len(store) == 30
        store.put(torch.arange(100), make_rows(torch.arange(100)))
    assert names(folder) == ["shard-00000.safetensors"]
    with RowStore(folder, wanted) as store:
        assert_rows(store, torch.arange(100), make_rows)


def test_two_writers_take_different_shards(tmp_path, wanted, make_rows):
    folder = tmp_path / "c" / "x"
    with RowStore(folder, wanted, write=True, expected=50) as a, RowStore(folder, wanted, write=True, expected=50) as b:
        for start in range(0, 50, 10):
            for store, first in ((a, start), (b, 50 + start)):
                rows = torch.arange(first, first + 10)
                store.put(rows, make_rows(rows))
    assert names(folder) == ["shard-00000.safetensors", "shard-00001.safetensors"]
    with RowStore(folder, wanted) as store:
        assert_rows(store, torch.arange(100), make_rows)


def test_reading_ahead_while_another_thread_writes(tmp_path, wanted, make_rows):
    with RowStore(tmp_path / "c" / "x", wanted, write=True, expected=4000) as store:
        store.put(torch.arange(100), make_rows(torch.arange(100)))

        def write():
            for start in range(100, 4000, 50):
                store.put(torch.arange(start, start + 50), make_rows(torch.arange(start, start + 50)))

        writer = threading.Thread(target=write)
        writer.start()
        for _ in range(50):
            asked = [torch.randint(0, 100, (64,)) for _ in range(3)]
            outs = [store.empty(64) for _ in asked]
            tickets = [store.submit(rows, out) for rows, out in zip(asked, outs)]
            for ticket, rows, out in zip(tickets, asked, outs):
                store.wait(ticket)
                assert all(torch.equal(o, e) for o, e in zip(out, make_rows(rows)))
        writer.join()
        assert_rows(store, torch.randperm(4000), make_rows)


def test_other_rows_are_refused_with_what_differs(filled, wanted):
    wanted.fingerprint = {"teacher": "t2", "data": {"name": "d", "images": 99}}
    with pytest.raises(CacheError, match="data.images: stored 100, now 99; teacher: stored 't1', now 't2'.*cache gc"):
        RowStore(filled, wanted)
    wanted.parts = wanted.parts[:1]
    with pytest.raises(CacheError, match="parts: stored"):
        RowStore(filled, wanted, write=True)


def test_rows_of_a_wrong_shape_are_refused(filled, make_rows):
    codes, scales = make_rows(torch.arange(4))
    with RowStore(filled, write=True) as store:
        with pytest.raises(CacheError, match="got .*float32"):
            store.put(torch.arange(4), [codes.float(), scales])
        with pytest.raises(CacheError, match="contiguous"):
            store.gather(torch.arange(4), [codes.transpose(2, 3), scales])


def test_the_budget_ends_the_filling_before_a_shard_begins(tmp_path, wanted, make_rows, monkeypatch):
    monkeypatch.setattr("stablekd_fast.cache.store._SMALLEST_SHARD", 25 * wanted.row_bytes)
    folder = tmp_path / "cache" / "x"
    size = 4096 + 25 * (wanted.row_bytes + 12)
    with RowStore(folder, wanted, write=True, budget=2 * size + 10) as store:
        with pytest.raises(CacheFull, match=f"holds {2 * size} bytes, and {size} more.*disk_budget"):
            store.put(torch.arange(100), make_rows(torch.arange(100)))
        assert len(store) == 50
        assert_rows(store, torch.arange(50), make_rows)
    assert sum(path.stat().st_size for path in folder.glob("*shard*")) == 2 * size
    with RowStore(folder.parent / "y", wanted, write=True, budget=3 * size) as other:  # one budget for all columns
        other.put(torch.arange(25), make_rows(torch.arange(25)))
        with pytest.raises(CacheFull):
            other.put(torch.arange(100), make_rows(torch.arange(100)))


FILL_A_SMALL_DISK = """
import resource, signal, sys, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
from conftest import PARTS, SAMPLES, make_rows
from stablekd_fast.cache.manifest import Manifest
from stablekd_fast.cache.store import RowStore
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = RowStore(Path({folder!r}), Manifest(PARTS, SAMPLES, {{}}), write=True, expected=10)
store.put(torch.arange(10), make_rows(torch.arange(10)))
resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
store.put(torch.arange(100), make_rows(torch.arange(100)))
"""


def test_a_disk_that_refuses_leaves_what_is_stored(tmp_path, make_rows):
    """The file-size limit of a real process stands for the full disk."""
    folder = tmp_path / "c" / "x"
    script = FILL_A_SMALL_DISK.format(tests=str(Path(__file__).parent), folder=str(folder))
    said = Forked("-c", script).communicate(120)[0]
    assert "CacheFull" in said and "were refused" in said, said
    assert names(folder) == ["shard-00000.safetensors"]
    with RowStore(folder, write=True) as store:
        assert_rows(store, torch.arange(10), make_rows)


def test_a_full_file_system_leaves_what_is_stored(small_disk, wanted, make_rows):
    wanted.samples = 100_000
    with RowStore(small_disk / "x", wanted, write=True, expected=1000) as store:
        store.put(torch.arange(1000), make_rows(torch.arange(1000)))
        store.expected = 100_000
        with pytest.raises(CacheFull, match="No space left on device"):
            store.put(torch.arange(20_000), make_rows(torch.arange(20_000)))
        assert_rows(store, torch.arange(1000), make_rows)
    assert names(small_disk / "x") == ["shard-00000.safetensors"]


def flipped(path: Path, bit: int) -> bytes:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    return bytes(data)


def test_a_flipped_bit_anywhere_in_a_shard_is_an_error_that_names_it(filled, wanted, make_rows):
    path = filled / "shard-00002.safetensors"
    whole = path.read_bytes()
    bits = torch.randint(0, len(whole) * 8, (300,), generator=torch.Generator().manual_seed(1)).tolist()
    end = len(whole) * 8
    bits += [0, 63, 64, 8 * 4095, 8 * 4096, 8 * (4096 + 75 * 25), end - 8 * 25 * 12, end - 8 * 25 * 4, end - 1]
    for bit in bits:
        path.write_bytes(flipped(path, bit))
        with pytest.raises(CacheError, match="shard-00002") as error:
            with RowStore(filled, wanted) as store:
                store.gather(torch.arange(100))
        if bit >= 8 * 4096:
            assert "ow " in str(error.value) or "row numbers" in str(error.value)
        path.write_bytes(whole)
    with RowStore(filled, wanted) as store:
        assert store.verify() == 100


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.bfloat16])
def test_of_rows_that_are_stored_in_part_the_others_are_added(tmp_path, dtype):
    """In every type of codes: torch 2.6 indexes no 8-bit floats."""
    values = torch.arange(40).view(10, 4).to(dtype)
    with RowStore(tmp_path / "x", Manifest((Part("rows", dtype, (4,)),), 10, {"teacher": "t"}), write=True) as store:
        store.put(torch.arange(3, 6), [values[3:6]])
        store.put(torch.arange(10), [values])
        assert torch.equal(store.gather(torch.arange(10))[0].float(), values.float())


def test_verify_names_the_damaged_row(filled, make_rows):
    path = filled / "shard-00001.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        key = int(file.get_tensor("keys")[3])
    path.write_bytes(flipped(path, 8 * (4096 + 3 * 75 + 10)))
    with RowStore(filled) as store:
        with pytest.raises(CacheError, match=rf"Row {key} \(sample {key}, view 0\) in .*shard-00001"):
            store.verify()


def test_damage_after_the_first_reading_is_found_where_asked_for(filled, make_rows):
    path = filled / "shard-00000.safetensors"
    for verify in (False, True):
        whole = path.read_bytes()
        with RowStore(filled, verify=verify) as store:
            store.gather(torch.arange(100))
            with open(path, "r+b") as file:
                file.seek(5000)
                file.write(b"\x55\x55")
            if verify:
                with pytest.raises(CacheError, match="checksum"):
                    store.gather(torch.arange(100))
            else:
                store.gather(torch.arange(100))
        path.write_bytes(whole)


def test_every_flipped_bit_of_a_manifest_is_an_error(filled, wanted):
    path = filled / "manifest.json"
    whole = path.read_bytes()
    for bit in range(0, len(whole) * 8, 7):
        changed = flipped(path, bit)
        if json_of(changed) == json_of(whole):
            continue  # white space
        path.write_bytes(changed)
        with pytest.raises(CacheError):
            RowStore(filled, wanted).close()
    path.write_bytes(whole)
    RowStore(filled, wanted).close()


def json_of(data: bytes):
    try:
        return json.loads(data)
    except ValueError:
        return None


def test_a_missing_or_short_shard_is_named(filled, wanted):
    path = filled / "shard-00003.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(CacheError, match="shard-00003.* bytes"):
        RowStore(filled, wanted)
    path.unlink()
    with pytest.raises(CacheError, match="shard-00003.*cannot be opened"):
        RowStore(filled, wanted)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 63, 64, 65, 4096])
def test_both_checksums_agree_with_the_definition(size):
    data = torch.randint(0, 256, (size + 1,), dtype=torch.uint8)[1:].clone()
    crc = 0xFFFFFFFF
    for byte in data.tolist():
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    assert core.crc32c(data.data_ptr(), size) == core.crc32c_by_tables(data.data_ptr(), size) == crc ^ 0xFFFFFFFF


def test_wide_rows_are_read_by_several_threads(tmp_path):
    manifest = Manifest((Part("rows", torch.float32, (50_000,)),), 64, {})
    values = torch.randn(64, 50_000)
    with RowStore(tmp_path / "c" / "x", manifest, write=True) as store:
        store.put(torch.arange(64), [values])
        rows = torch.randint(0, 64, (512,))
        assert torch.equal(store.gather(rows)[0], values[rows])
