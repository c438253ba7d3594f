"""What lies in a cache's folder and was not written there: it is told, and neither served nor deleted."""

import errno
import json
import os
import warnings

import pytest
import torch

from stablekd_fast import cli
from stablekd_fast.cache import maintain
from stablekd_fast.cache.manifest import MANIFEST, Manifest, _digest
from stablekd_fast.cache.shard import Shard
from stablekd_fast.cache.store import RowStore
from stablekd_fast.errors import CacheError, CacheFull

from .conftest import SAMPLES

ROWS = torch.arange(SAMPLES)


def other(wanted, **facts):
    return Manifest(wanted.parts, wanted.samples, {**wanted.fingerprint, **facts})


def test_shards_of_another_teacher_are_neither_served_nor_deleted(filled, wanted, make_rows):
    """The manifest is gone, as an interrupted copy leaves it, and a run with another teacher comes."""
    (filled / MANIFEST).unlink()
    before = {path.name: path.read_bytes() for path in filled.glob("shard-*")}
    with pytest.warns(RuntimeWarning, match="is that of rows of something else"):
        store = RowStore(filled, other(wanted, teacher="t2"), write=True)
    with store:
        assert len(store) == 0
        store.put(ROWS[:10], [torch.zeros_like(part) for part in make_rows(ROWS[:10])])
        store.seal()
    assert {name: (filled / name).read_bytes() for name in before} == before
    with RowStore(filled, other(wanted, teacher="t2")) as store:
        assert len(store) == 10 and not store.gather(ROWS[:10])[0].any()


def test_shards_without_manifest_are_taken_up_by_a_run_of_the_same_rows(filled, wanted, make_rows):
    (filled / MANIFEST).unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with RowStore(filled, wanted, write=True) as store:
            assert all(map(torch.equal, store.gather(ROWS), make_rows(ROWS)))


@pytest.mark.parametrize("samples, parts", [(SAMPLES + 1, 2), (SAMPLES, 1)])
def test_a_shard_of_other_numbers_or_parts_is_another_column(filled, wanted, samples, parts):
    assert Manifest(wanted.parts[:parts], samples, wanted.fingerprint).column != wanted.column
    assert Manifest(wanted.parts, SAMPLES, dict(reversed(wanted.fingerprint.items()))).column == wanted.column


def test_what_a_finished_run_stored_is_whole_for_readers(tmp_path, wanted, make_rows, capsys):
    folder = tmp_path / "cache" / "x"
    with RowStore(folder, wanted, write=True) as store:
        store.put(ROWS[:30], make_rows(ROWS[:30]))
        store.seal()
        store.seal()  # nothing is left to do
    assert maintain.unfinished(folder) == [] and maintain.collect(folder.parent, half_filled=True) == []
    (row,), damaged = maintain.describe(folder.parent)
    assert (row["rows"], row["shards"], row["unfinished"], damaged) == (30, 1, 0, [])
    with RowStore(folder, wanted) as store:
        assert len(store) == 30 and all(map(torch.equal, store.gather(ROWS[:30]), make_rows(ROWS[:30])))
    with RowStore(folder, wanted, write=True) as store:  # a longer run adds what is missing
        store.put(ROWS, make_rows(ROWS))
        store.seal()
    assert maintain.verify(folder.parent) == ({"x": SAMPLES}, [])
    assert cli.main(["cache", "verify", str(folder.parent)]) == 0 and "100" in capsys.readouterr().out


def test_a_shard_that_got_no_row_is_removed_when_its_run_is_complete(tmp_path, wanted, make_rows, monkeypatch):
    folder = tmp_path / "cache" / "x"
    with RowStore(folder, wanted, write=True) as store:
        with monkeypatch.context() as refused, pytest.raises(CacheFull):
            write = os.pwrite

            def refuse(file, data, offset):  # what comes behind header and empty index
                if offset == 4096:
                    raise OSError(errno.EROFS, "Read-only file system")
                return write(file, data, offset)

            refused.setattr(os, "pwrite", refuse)
            store.put(ROWS[:30], make_rows(ROWS[:30]))
        assert len(list(folder.glob(".shard-*"))) == 1 and len(store) == 0
        store.seal()
        assert not list(folder.glob("*shard-*"))
        store.put(ROWS[:30], make_rows(ROWS[:30]))  # it goes on
        assert all(map(torch.equal, store.gather(ROWS[:30]), make_rows(ROWS[:30])))


@pytest.mark.parametrize("call", [1, 2, 3, 4])
@pytest.mark.parametrize("partly", [True, False])
def test_rows_stay_whole_where_a_write_between_them_was_refused(tmp_path, wanted, make_rows, monkeypatch, call, partly):
    """A row is written in four calls: two parts, the checksums, the row numbers."""
    folder, write, calls = tmp_path / "cache" / "x", os.pwrite, []

    def refuse(file, data, offset):
        calls.append(offset)
        if len(calls) == call and partly:
            return write(file, data[:8], offset)
        if len(calls) == call + partly:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data, offset)

    with RowStore(folder, wanted, write=True) as store:
        store.put(ROWS[:10], make_rows(ROWS[:10]))
        with monkeypatch.context() as refused, pytest.raises(CacheFull):
            refused.setattr(os, "pwrite", refuse)
            store.put(ROWS[10:30], make_rows(ROWS[10:30]))
        assert len(store) == 10
        store.seal()
    with RowStore(folder, wanted) as store:
        assert len(store) == 10 and store.verify() == 10
        assert all(map(torch.equal, store.gather(ROWS[:10]), make_rows(ROWS[:10])))


@pytest.mark.parametrize("sealed", [True, False])
def test_a_flipped_bit_is_found_in_full_and_in_half_filled_shards(tmp_path, wanted, make_rows, sealed, capsys):
    folder = tmp_path / "cache" / "x"
    with RowStore(folder, wanted, write=True) as store:
        store.put(ROWS[:30], make_rows(ROWS[:30]))
        if sealed:
            store.seal()
    (path,) = folder.glob("*shard-*")
    data = bytearray(path.read_bytes())
    data[4096 + 20 * wanted.parts[0].bytes] ^= 1  # of row 20
    path.write_bytes(data)
    assert cli.main(["cache", "verify", str(folder.parent)]) == 2
    said = capsys.readouterr().err
    assert str(path) in said and ("does not fit its checksum" if sealed else "slot 20 is not whole") in said


def test_verify_reads_each_shard_once(tmp_path, wanted, make_rows, monkeypatch):
    folder, read = tmp_path / "x", []
    with RowStore(folder, wanted, write=True) as store:
        store.put(ROWS[:30], make_rows(ROWS[:30]))
        store.seal()
        store.put(ROWS[30:50], make_rows(ROWS[30:50]))
    whole = Shard.first_bad_slot
    monkeypatch.setattr(
        Shard, "first_bad_slot", lambda shard, reader: (read.append(shard.path), whole(shard, reader))[1]
    )
    with RowStore(folder, wanted) as store:
        assert store.verify() == 50 and sorted(read) == sorted(folder.glob("*shard-*")) and len(read) == 2
    read.clear()
    with RowStore(folder, wanted, write=True) as store:
        store.put(ROWS[50:60], make_rows(ROWS[50:60]))
        assert store.verify() == 60 and len(read) == 3, "what was added since is read too"


EDITS = {
    "no shards": lambda m: m.pop("shards"),
    "shards in a list": lambda m: m.update(shards=[]),
    "a shard elsewhere": lambda m: m["shards"].update({"../x/shard-00000.safetensors": {"rows": 1}}),
    "unknown type": lambda m: m["parts"][0].update(dtype="F64"),
    "a part of no bytes": lambda m: m["parts"][0].update(shape=[0]),
    "a part of 2^80 bytes": lambda m: m["parts"][0].update(shape=[1 << 40, 1 << 40]),
    "a part called keys": lambda m: m["parts"][0].update(name="keys"),
    "no parts": lambda m: m.update(parts=[]),
    "no samples": lambda m: m.update(samples=0),
    "samples as text": lambda m: m.update(samples="100"),
    "samples true": lambda m: m.update(samples=True),
    "rows below nothing": lambda m: m["shards"]["shard-00000.safetensors"].update(rows=-1),
    "rows as text": lambda m: m["shards"]["shard-00000.safetensors"].update(rows="x"),
    "2^70 rows": lambda m: m["shards"]["shard-00000.safetensors"].update(rows=1 << 70),
    "2^39 rows": lambda m: m["shards"]["shard-00000.safetensors"].update(rows=1 << 39, used=1),
    "more used than there is room": lambda m: m["shards"]["shard-00000.safetensors"].update(used=26),
    "index in a list": lambda m: m["shards"]["shard-00000.safetensors"].update(index=[]),
    "an older format": lambda m: m.update(format=1),
    "a newer format": lambda m: m.update(format=9),
    "fingerprint in a list": lambda m: m.update(fingerprint=[1]),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_manifest_that_says_what_cannot_be_is_one_sentence(filled, edit):
    content = json.loads((filled / MANIFEST).read_text())
    content.pop("digest")
    EDITS[edit](content)
    (filled / MANIFEST).write_text(json.dumps({**content, "digest": _digest(content)}))
    with pytest.raises(CacheError, match=r"layer1\.int8.*cache gc"):
        RowStore(filled)
    damaged = maintain.verify(filled.parent)[1]
    assert len(damaged) == 1 and str(filled) in damaged[0]
    maintain.describe(filled.parent)
    assert maintain.collect(filled.parent, [filled.name]) == [filled.name]  # as the sentence says


@pytest.mark.parametrize("text", [b"", b"{}", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"digest": "x"}', b"1e999"])
def test_a_manifest_of_something_else_is_one_sentence(filled, text):
    (filled / MANIFEST).write_bytes(text)
    with pytest.raises(CacheError, match=r"manifest\.json (cannot be read|is not what was written)"):
        RowStore(filled)


def test_a_fingerprint_that_says_nothing_is_shown_all_the_same(tmp_path, wanted, make_rows):
    folder = tmp_path / "cache" / "x"
    with RowStore(folder, Manifest(wanted.parts, SAMPLES, {"data": "d"}), write=True) as store:
        store.put(ROWS, make_rows(ROWS))
    (row,), _ = maintain.describe(folder.parent)
    assert (row["rows"], row["teacher"], row["data"], row["view_seed"]) == (SAMPLES, "", "", None)


def header_of(rows):
    return (4088).to_bytes(8, "little") + json.dumps({"keys": {"shape": [rows]}}).encode().ljust(4088)


STRAYS = {
    "a copy of a shard": lambda folder: (folder / "shard-00000 (copy).safetensors").write_bytes(b"x" * 5000),
    "a folder": lambda folder: (folder / ".shard-00007.safetensors").mkdir(),
    "a pipe": lambda folder: os.mkfifo(folder / ".shard-00007.safetensors"),
    "a link to nowhere": lambda folder: (folder / ".shard-00007.safetensors").symlink_to("nowhere"),
    "a number with a sign": lambda folder: (folder / ".shard--0007.safetensors").write_bytes(b"x" * 5000),
    **{
        f"a header of {rows} rows": lambda folder, rows=rows: (folder / ".shard-00007.safetensors").write_bytes(
            header_of(rows)
        )
        for rows in (1 << 40, 1 << 70, -1, 0, "x", True, 1.5, [1])
    },
    "a header of 2^60 bytes": lambda folder: (folder / ".shard-00007.safetensors").write_bytes(
        (1 << 60).to_bytes(8, "little") + b"{" * 5000
    ),
}


@pytest.mark.parametrize("stray", STRAYS)
def test_a_stray_file_is_left_as_it_is(filled, wanted, make_rows, stray):
    STRAYS[stray](filled)
    before = sorted(path.name for path in filled.iterdir())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with RowStore(filled, wanted, write=True, expected=150) as store:
            store.put(torch.arange(150), make_rows(torch.arange(150)))
        with RowStore(filled, wanted) as store:
            assert all(map(torch.equal, store.gather(torch.arange(150)), make_rows(torch.arange(150))))
        assert maintain.describe(filled.parent)[0][0]["rows"] == 150
    assert set(before) <= {path.name for path in filled.iterdir()}
    assert all("left as it is" in str(warning.message) for warning in said)
    assert bool(said) == stray.startswith("a header"), "files with a shard's name are told"


def test_a_shard_whose_writer_died_before_its_header_is_removed(filled, wanted):
    for number, size in ((7, 0), (8, 100), (9, 10_000)):
        (filled / f".shard-{number:05d}.safetensors").write_bytes(bytes(size))
    with RowStore(filled, wanted) as store:  # not by a reader
        assert len(store) == SAMPLES
    assert len(list(filled.glob(".shard-*"))) == 3
    with RowStore(filled, wanted, write=True) as store:
        assert len(store) == SAMPLES
    assert list(filled.glob(".shard-*")) == []


def test_gc_deletes_own_files_only(filled):
    (filled / "notes.txt").write_text("mine")
    (filled / "shard-00000 (copy).safetensors").write_text("mine")
    (filled / f".{MANIFEST}.99.tmp").write_text("left")
    with pytest.warns(UserWarning, match=r"stays: it holds files .*notes\.txt"):
        assert maintain.collect(filled.parent, [filled.name]) == []
    assert sorted(path.name for path in filled.iterdir()) == ["notes.txt", "shard-00000 (copy).safetensors"]


def test_gc_follows_no_link(filled, tmp_path):
    linked = tmp_path / "other"
    linked.mkdir()
    (linked / "x").symlink_to(filled)
    with pytest.raises(CacheError, match="is a link"):
        maintain.collect(linked, ["x"])
    assert len(list(filled.glob("shard-*"))) == 4


@pytest.mark.parametrize("write", [True, False])
def test_gc_leaves_a_column_that_is_open(filled, wanted, make_rows, write):
    """Even where no shard is being written."""
    with RowStore(filled, wanted, write=write) as store:
        with pytest.raises(CacheError, match="in use by another process"):
            maintain.collect(filled.parent, [filled.name])
        assert all(map(torch.equal, store.gather(ROWS), make_rows(ROWS)))
    assert maintain.collect(filled.parent, [filled.name]) == [filled.name]


def test_a_store_that_could_not_be_opened_holds_nothing(filled):
    (filled / "shard-00002.safetensors").write_bytes(b"x")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CacheError, match=r"shard-00002") as caught:
        RowStore(filled, write=True)
    assert "cache gc" in str(caught.value) and len(os.listdir("/proc/self/fd")) == before
    assert maintain.collect(filled.parent, [filled.name]) == [filled.name]


def test_what_an_interrupted_gc_left_is_named_and_can_be_deleted(filled, wanted):
    (filled / "shard-00001.safetensors").unlink()
    with pytest.raises(CacheError, match=r"shard-00001.*cache gc"):
        RowStore(filled, wanted, write=True)
    maintain.collect(filled.parent, [filled.name])
    with RowStore(filled, wanted, write=True) as store:
        assert len(store) == 0
