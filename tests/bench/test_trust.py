"""The campaign itself: a fault that is put in is found, a log of trials is gone on with, lost writes are lost."""

import errno
import json
import random
import signal

import pytest

from stablekd_fast import cli
from stablekd_fast.bench.trust import campaign, flips, kills, power, soak
from stablekd_fast.bench.trust.calls import Trouble
from stablekd_fast.bench.trust.runs import Runs
from stablekd_fast.errors import ConfigError


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    made = Runs(tmp_path_factory.mktemp("runs"), cached=True)
    yield made
    made.close()


def test_a_disturbed_run_comes_to_the_bits_of_one_left_alone(runs):
    runs.clear()
    alone = runs.run()
    whole = runs.weights_reached()
    assert alone.codes == [0] and runs.faults(whole, alone) == [] and alone.calls > 50
    for trouble in (Trouble(kills=alone.calls // 2), Trouble(fails=alone.calls // 3, error=errno.ENOSPC)):
        runs.clear()
        ended = runs.run(trouble)
        assert ended.is_clear and (ended.codes == [-signal.SIGKILL]) == bool(trouble.kills)
        assert runs.faults(whole, runs.finish()) == []
    runs.clear()
    asked = runs.run(signal=(signal.SIGTERM, 0.6 * alone.seconds))
    assert asked.codes in ([143], [0]) and kills._of_the_end(asked, signal.SIGTERM) == []
    ended = runs.finish()
    (runs.cache / "left").write_text("by nobody")
    other = dict(whole)
    name = next(iter(other))
    other[name] = other[name] + 1
    assert runs.faults(whole, ended) == ["files too many or too few: left"]
    assert f"1 tensors are others, {name} for one" in runs.faults(other, ended)


def test_what_a_crash_leaves_is_what_was_flushed_and_some_of_the_rest():
    disk, folder = power.Disk(), b"/c"
    for call in (
        power.Call("o", 1, 0, b"/c/a", b""),
        power.Call("w", 1, 0, b"x" * 1000, b""),
        power.Call("s", 1, 0, b"/c/a", b""),
        power.Call("s", 9, 0, folder, b""),
        power.Call("w", 1, 1000, b"y" * 1000, b""),
        power.Call("o", 2, 0, b"/c/b", b""),
        power.Call("w", 2, 0, b"z" * 600, b""),
        power.Call("r", 0, 0, b"/c/b", b"/c/a"),
    ):
        disk.apply(call)
    seen = [disk.crashed(random.Random(seed)) for seed in range(300)]
    assert {tuple(sorted(one)) for one in seen} == {("/c/a",), ("/c/a", "/c/b")}
    old = [one["/c/a"] for one in seen if not one["/c/a"].startswith(b"z") and one["/c/a"][:1] == b"x"]
    assert old and all(one.startswith(b"x" * 1000) for one in old), "what was flushed is there"
    sizes = {len(one) for one in old}
    assert {1000, 2000} <= sizes and len(sizes) > 2, "writes are lost, kept, torn"
    assert b"" in {one["/c/a"] for one in seen}, "a name may come before its bytes"


def test_a_reader_that_takes_anything_is_found_by_flips(tmp_path, monkeypatch):
    assert not any(faults for faults in flips.flips(tmp_path / "a", 0, 97))
    monkeypatch.setattr("stablekd_fast.engine.checkpoint.check_tensors", lambda *_: None)
    assert any(faults for faults in flips.flips(tmp_path / "b", 0, 97))


def test_what_grows_is_told():
    draw = random.Random(0)
    steady = [{name: 100 + draw.random() for name in soak.ALLOWED} for _ in range(200)]
    assert soak.grown(steady) == []
    for name in soak.ALLOWED:
        growing = [{**one, name: one[name] + 0.2 * at} for at, one in enumerate(steady)]
        (told,) = soak.grown(growing)
        assert told.startswith(name) and "per run" in told


def test_an_interrupted_line_goes_on(tmp_path, monkeypatch):
    begun = []

    def tried(folder, first, count):
        begun.append(first)
        for number in range(first, count):
            if number == 3 and not first:
                raise KeyboardInterrupt
            yield [f"fault {number}"] if number == 4 else []

    monkeypatch.setitem(campaign.LINES, "calls", campaign.Line("what", tried, long=(6,), short=(6,)))
    with pytest.raises(KeyboardInterrupt):
        campaign.run_trust(tmp_path, ["calls"], short=True)
    for _ in range(2):  # the second time nothing is left to do
        found = campaign.run_trust(tmp_path, ["calls"], short=True)
        (row,) = found.tables["trust"]
        assert (row["trials"], row["lost"], found.refused) == (6, 1, ["fault 4"]) and begun == [0, 3]
    assert len((tmp_path / "calls-short.jsonl").read_text().splitlines()) == 7


def test_the_command_shows_the_table_and_names_what_was_lost(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(
        campaign.LINES, "calls", campaign.Line("what", lambda *_: iter([[], ["a fault"]]), long=(), short=())
    )
    words = ["bench", "trust", "--out", str(tmp_path), "--lines", "calls", "--json", str(tmp_path / "found.json")]
    assert cli.main(words) == 2
    said = capsys.readouterr()
    assert "calls" in said.out and "a fault" in said.err
    assert json.loads((tmp_path / "found.json").read_text())["tables"]["trust"][0]["lost"] == 1
    with pytest.raises(ConfigError, match="nearest is 'kills'"):
        campaign.run_trust(tmp_path, ["kils"], short=True)
