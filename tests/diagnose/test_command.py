"""`stablekd diagnose` as a person uses it, on the embedded digits."""

import json
import re

import pytest
import torch

from stablekd_fast import models
from stablekd_fast.cli import main
from stablekd_fast.data import open_dataset
from stablekd_fast.diagnose.settings import ARMS
from stablekd_fast.engine.checkpoint import save_tensors

SHORT = ["--steps", "4", "--seeds", "2", "--probes", "2", "--probe-batches", "2"]
SMALL = ["--subset", "64", "--validation", "0", "--batch-size", "16", "--device", "cpu", "--precision", "fp32"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> list[str]:
    """A teacher whose batch-norm statistics are those of the digits, so that its activations do not fade."""
    torch.manual_seed(0)
    teacher, images = models.build("resnet20", 10), open_dataset("digits").train.images[:128]
    teacher.train()(images.permute(0, 3, 1, 2).float() / 255)
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_tensors(path, teacher.state_dict(), {})
    return ["--teacher", "resnet20", "--teacher-weights", str(path), "--student", "resnet20_half"]


@pytest.fixture(scope="module")
def diagnosed(pair, tmp_path_factory):
    out = tmp_path_factory.mktemp("diagnosed") / "out"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert main(["diagnose", *pair, *SMALL, *SHORT, "--seed", "3", "--optimizer.lr", "0.01", "--out", str(out)]) == 0
    torch.set_num_threads(threads)
    return out


def test_all_rows_are_kept_with_where_they_come_from(diagnosed):
    document = json.loads((diagnosed / "diagnose.json").read_text())
    assert len(document["blocks"]) == 2 * 2 * 2 * 4 and len(document["between"]) == 2 * 2 * 3
    assert {row["seed"] for row in document["blocks"]} == {3, 4} and {row["arm"] for row in document["blocks"]} == set(
        ARMS
    )
    assert {row["step"] for row in document["blocks"]} == {1, 3}
    assert document["settings"]["optimizer"]["lr"] == 0.01 and document["settings"]["steps"] == 4
    assert "epochs" not in document["settings"], "a setting that was not used"
    assert document["machine"] and document["versions"]["torch"] == torch.__version__
    for row in document["blocks"]:
        assert row["arm"] == "end to end" or row["entanglement"] == 0.0
    gap = document["summary"]["gap"]
    assert gap["low"] < gap["mean"] < gap["high"] and len(gap["values"]) == 2


def test_the_page_needs_nothing_else_and_says_what_the_file_says(diagnosed):
    page, document = ((diagnosed / name).read_text() for name in ("report.html", "diagnose.json"))
    assert not re.search(r"https?://|@import|<script", page) and page.count("<svg") == 7
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids)), "ids of different plots collide"
    assert not re.search(r"(stroke|fill): #0000", page), "a stand-in colour was left in a plot"
    used, defined = set(re.findall(r"var\((--[\w-]+)\)", page)), set(re.findall(r"(--[\w-]+):", page))
    assert used <= defined
    verdict = json.loads(document)["verdict"]
    assert verdict["headline"] in page and len(verdict["why"]) == 3
    plot = (diagnosed / "gap.svg").read_text()
    assert plot.startswith("<svg xmlns=") and "var(" not in plot and "gap, all blocks" in plot


def test_the_same_seeds_give_the_same_rows(diagnosed, pair, tmp_path):
    out = tmp_path / "again"
    assert main(["diagnose", *pair, *SMALL, *SHORT, "--seed", "3", "--optimizer.lr", "0.01", "--out", str(out)]) == 0
    one, other = (json.loads((path / "diagnose.json").read_text()) for path in (diagnosed, out))
    assert one["blocks"] == other["blocks"] and one["between"] == other["between"]


def test_a_diagnosis_is_not_overwritten(diagnosed, pair, capsys):
    before = (diagnosed / "diagnose.json").read_bytes()
    assert main(["diagnose", *pair, *SMALL, *SHORT, "--out", str(diagnosed)]) == 2
    assert "already holds a diagnosis" in capsys.readouterr().err
    assert (diagnosed / "diagnose.json").read_bytes() == before


@pytest.mark.parametrize(
    "words, said",
    [
        (["--seeds", "1"], "an interval over seeds needs at least 2"),
        (["--probes", "9"], "give fewer"),
        (["--epochs", "3"], "epochs"),
        (["--cuts", "[nowhere]"], "nowhere"),
        (["--student", "resnet21"], "resnet20"),
        (["--optimizer.lr", "1e9"], "not finite"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_leaves_nothing(words, said, pair, tmp_path, capsys):
    assert main(["diagnose", *pair, *SMALL, *SHORT, *words, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("stablekd: ") and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_a_teacher_without_weights_is_refused(tmp_path, capsys):
    assert main(["diagnose", "--student", "resnet20", *SMALL, *SHORT, "--out", str(tmp_path / "out")]) == 2
    assert "--teacher-weights" in capsys.readouterr().err
