"""Files from elsewhere are regular ones, and no larger than they may be."""

import os
import socket

import pytest

from stablekd_fast.cli import main
from stablekd_fast.files.reading import open_regular, read_document


def pipe(path):
    os.mkfifo(path)


def listening(path):
    socket.socket(socket.AF_UNIX).bind(str(path))


@pytest.mark.parametrize("make, words", [(pipe, "a pipe"), (listening, "No such device"), (os.mkdir, "a folder")])
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path, monkeypatch, make, words):
    monkeypatch.chdir(tmp_path)  # a socket's name is short
    make("x")
    with pytest.raises(OSError, match=words):
        open_regular("x")


def test_devices_are_refused_and_links_to_files_are_followed(tmp_path):
    with pytest.raises(OSError, match="a device"):
        open_regular("/dev/zero")
    (tmp_path / "file").write_bytes(b"text")
    (tmp_path / "link").symlink_to("file")
    assert read_document(tmp_path / "link") == b"text"


def test_a_document_is_read_up_to_its_limit(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 100)
    assert read_document(tmp_path / "file", 100) == b"x" * 100
    with pytest.raises(OSError, match="larger than 99 bytes"):
        read_document(tmp_path / "file", 99)


@pytest.mark.parametrize(
    "words",
    [
        ["bench", "show", "PIPE"],
        ["evaluate", "PIPE", "--model", "resnet8", "--data", "digits"],
        ["distill", "--config", "PIPE"],
        ["distill", "--student", "resnet20", "--student-weights", "PIPE", "--method", "ce", "--out", "OUT"],
        ["plan", "--teacher", "resnet8", "--student", "resnet8", "--budget-disk", "1GB", "--device-profile", "PIPE"],
    ],
)  # fmt: skip
def test_a_command_that_is_given_a_pipe_ends(tmp_path, capfd, words):
    pipe(tmp_path / "pipe")
    given = [str(tmp_path / "pipe") if word == "PIPE" else word for word in words]
    given = [str(tmp_path / "out") if word == "OUT" else word for word in given]
    assert main(given) == 2
    said = capfd.readouterr().err
    assert "pipe" in said and "Traceback" not in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "config, words",
    [
        ("optimizer: {warmup: -1}", "optimizer.warmup=-1.0"),
        ("stages: [{groups: [[0]], share: -1}]", "exactly one of share"),
    ],
)
def test_a_setting_that_is_refused_is_said_in_its_own_words(tmp_path, capfd, config, words):
    (tmp_path / "c.yaml").write_text(config)
    assert main(["distill", "--config", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "out")]) == 2
    said = capfd.readouterr().err
    assert words in said and "Union" not in said and said.count("\n") == 1
