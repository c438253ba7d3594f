"""Whatever is typed ends in an exit code and words of our own: no traceback, no hang, nothing half-written."""

import contextlib
import os
import signal
import subprocess
import sys
import traceback
import warnings

import pytest

from stablekd_fast import cli
from stablekd_fast.errors import StableKDError
from tests.cli.random_lines import lines, prepare
from tests.processes import Forked

SECONDS = 20


class Stopped(StableKDError):
    """Training would begin now."""


class Hang(BaseException):
    """A command takes longer than it may."""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with what the lines speak of, in which training is stopped before its first step."""
    prepare(tmp_path)

    def stopped(*_, **__):
        raise Stopped("Training would begin now.")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("stablekd_fast.engine.loop.Engine.train", stopped)
    monkeypatch.setattr("stablekd_fast.run.distiller.Distiller.build_cache", stopped)
    monkeypatch.setattr("stablekd_fast.diagnose.training.Twin.train", stopped)
    yield tmp_path
    os.chmod(tmp_path / "locked", 0o700)


def ends(words, capfd) -> str | None:
    """Run one line; return what is wrong with how it ends, or None."""

    def late(*_):
        raise Hang

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            code = cli.main(words)
    except SystemExit as left:
        code = left.code
    except Hang:
        return f"no end within {SECONDS} s"
    except BaseException:
        return traceback.format_exc()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    said = capfd.readouterr()
    if "Traceback" in said.err:
        return said.err
    if code not in (0, 1, 2, None):
        return f"exit code {code}"
    return None if code != 2 or len((said.err + said.out).strip()) > 20 else f"exit code 2 and only {said.err!r}"


def tried(place, capfd, count, seed):
    wrong = []
    for words in lines(seed, count, place):
        reason = ends(words, capfd)
        if reason is not None:
            wrong.append((words, reason))
        with contextlib.suppress(OSError):
            assert not [path for path in (place / "out").rglob("*.tmp")], words
    return wrong


def shown(wrong) -> str:
    return "\n\n".join(f"{' '.join(map(repr, words))}\n{reason[-1500:]}" for words, reason in wrong[:8])


def test_two_hundred_random_lines_end_in_words_of_our_own(place, capfd):
    wrong = tried(place, capfd, 200, seed=1)
    assert not wrong, f"{len(wrong)} of 200:\n{shown(wrong)}"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 109))
def test_two_thousand_random_lines_end_in_words_of_our_own(place, capfd, seed):
    """With those of the test before, 2,000."""
    wrong = tried(place, capfd, 200, seed)
    assert not wrong, f"{len(wrong)} of 200:\n{shown(wrong)}"


def test_ten_random_lines_end_so_as_processes(tmp_path):
    """Such as end before training. Two are interpreters, to their very end; the others are forked."""
    prepare(tmp_path)
    chosen = [words for words in lines(7, 80, tmp_path) if "distill" not in words and "demo" not in words][:10]
    for number, words in enumerate(chosen):
        typed = ["-m", "stablekd_fast", *(word.replace("\0", "") for word in words)]
        if number < 2:
            command = [os.fsencode(word) for word in (sys.executable, *typed)]
            done = subprocess.run(command, capture_output=True, timeout=120, cwd=tmp_path, stdin=subprocess.DEVNULL)
            code, said = done.returncode, done.stderr.decode(errors="replace")
        else:
            process = Forked(*typed, folder=tmp_path)
            said, code = process.communicate(120)[0], process.returncode
        assert code in (0, 1, 2) and "Traceback" not in said, (words, said[-1500:])
    os.chmod(tmp_path / "locked", 0o700)
