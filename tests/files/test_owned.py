"""Files of our own: no link is followed, what killed processes left goes, one run holds a directory."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from stablekd_fast import distill
from stablekd_fast.cache.disk import DiskBudget
from stablekd_fast.cache.manifest import Manifest
from stablekd_fast.cache.shard import Part
from stablekd_fast.cache.store import RowStore
from stablekd_fast.errors import CacheFull, ConfigError, ModelError, TrainingError
from stablekd_fast.files import write_atomically
from stablekd_fast.files.owned import RUN_LOCK, only_run_in
from stablekd_fast.report import Recorder
from tests.processes import Forked

KILLED = """
import os, signal, sys
from pathlib import Path
from stablekd_fast.files import write_atomically
os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)
write_atomically(Path(sys.argv[1]), bytes(1000))
"""
HOLDS = """
import sys, time
from pathlib import Path
from stablekd_fast.files.owned import only_run_in
with only_run_in(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
SHORT = {"data": "digits", "method": "ce", "student": "resnet20", "epochs": 0.1, "validation": 0, "precision": "fp32"}


def killed_while_writing(path):
    assert Forked("-c", KILLED, path).wait(60) == -signal.SIGKILL


def test_what_killed_processes_left_is_removed_by_the_next_writing_of_the_same_file(tmp_path):
    for name in ("a", "b"):
        killed_while_writing(tmp_path / name)
    for other in (".a.x.tmp", ".a.12.tmp.txt", "a.12.tmp", ".ab.12.tmp"):
        (tmp_path / other).write_text("of somebody else")
    assert len(list(tmp_path.glob(".a.*.tmp"))) == 2
    write_atomically(tmp_path / "a", b"whole")
    left = {path.name for path in tmp_path.iterdir()}
    assert {".a.x.tmp", ".a.12.tmp.txt", "a.12.tmp", ".ab.12.tmp", "a"} < left and len(left) == 6
    assert (tmp_path / "a").read_bytes() == b"whole", "and one of b's, which is not a's to remove"


def test_what_is_being_written_is_not_removed(tmp_path, monkeypatch):
    """A second process writes the same file while the first is at it."""
    inner = f"import sys; from pathlib import Path; from stablekd_fast.files import write_atomically; " \
            f"write_atomically(Path({str(tmp_path / 'a')!r}), b'second')"  # fmt: skip
    real = os.fsync

    def meanwhile(file):
        assert Forked("-c", inner).wait(60) == 0
        real(file)

    monkeypatch.setattr(os, "fsync", meanwhile)
    write_atomically(tmp_path / "a", b"first")
    assert (tmp_path / "a").read_bytes() == b"first" and os.listdir(tmp_path) == ["a"]


def test_a_temporary_file_of_a_process_of_the_same_number_is_replaced(tmp_path):
    (tmp_path / f".a.{os.getpid()}.tmp").write_text("old")
    write_atomically(tmp_path / "a", b"new")
    assert os.listdir(tmp_path) == ["a"]


@pytest.fixture
def victim(tmp_path):
    path = tmp_path / "thesis"
    path.write_text("precious")
    yield path
    assert path.read_text() == "precious"


def test_a_link_in_place_of_a_temporary_file_is_not_written_through(tmp_path, victim):
    (tmp_path / f".a.{os.getpid()}.tmp").symlink_to(victim)
    write_atomically(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new" and not (tmp_path / "a").is_symlink()


def test_a_link_in_place_of_a_lock_of_the_cache_is_refused(tmp_path, victim):
    column = tmp_path / "c" / "x.fp32"
    column.mkdir(parents=True)
    (column / ".lock").symlink_to(victim)
    with pytest.raises(CacheFull, match="a link in its place"), DiskBudget(column, 100).room_for(1):
        pass
    manifest = Manifest((Part("x", torch.float32, (8,)),), 20, {})
    with pytest.raises(CacheFull, match="a link in its place"), RowStore(column, manifest, write=True) as store:
        store.put(torch.arange(2), [torch.ones(2, 8)])


def test_a_link_in_place_of_the_log_is_refused(tmp_path, victim):
    (tmp_path / "events.jsonl").symlink_to(victim)
    with pytest.raises(TrainingError, match="a link in its place"), Recorder(tmp_path, progress=False):
        pass


def test_a_link_in_place_of_the_lock_of_a_run_is_refused(tmp_path, victim):
    (tmp_path / RUN_LOCK).symlink_to(victim)
    with pytest.raises(ConfigError, match="a link in its place"), only_run_in(tmp_path):
        pass


def test_a_second_run_in_a_directory_is_refused_until_the_first_has_ended(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=rf"already holds a run that goes on \(process {first.pid} on "):
            distill(**SHORT, out=str(tmp_path), progress=False)
        assert os.listdir(tmp_path) == [RUN_LOCK], "nothing is touched"
        first.send_signal(signal.SIGKILL)
    result = distill(**SHORT, out=str(tmp_path), progress=False)
    assert result.steps > 0 and RUN_LOCK not in os.listdir(tmp_path)


def test_a_refused_run_leaves_no_directory(tmp_path):
    with pytest.raises(ModelError):
        distill(**{**SHORT, "student": "resnet21"}, out=str(tmp_path / "new" / "out"), progress=False)
    assert not (tmp_path / "new" / "out").exists()


def test_of_two_runs_started_together_one_trains_and_one_is_refused(tmp_path):
    words = ["-m", "stablekd_fast", "distill", "--out", tmp_path / "out"]
    words += [word for key, value in SHORT.items() for word in (f"--{key}", value)]
    runs = [Forked(*words) for _ in range(2)]
    said = [run.communicate(timeout=300)[0] for run in runs]
    assert sorted(run.returncode for run in runs) == [0, 2], said
    assert "already holds a run" in said[[run.returncode for run in runs].index(2)]
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "out" / "events.jsonl").open()]
    assert kinds.count("run_start") == 1 and kinds[-1] == "run_end"
