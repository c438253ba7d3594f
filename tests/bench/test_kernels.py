"""`stablekd bench kernels` on its small cases."""

import csv
import json
import shutil

import pytest
import torch

from stablekd_fast import kernels
from stablekd_fast.bench.core import check, measure
from stablekd_fast.bench.operators.kernels import CASES, Setting
from stablekd_fast.bench.operators.losses import Loss, loss_case
from stablekd_fast.bench.operators.rivals import mse
from stablekd_fast.cli import main

QUICK = ["bench", "kernels", "--quick", "--no-compile", "--threads", "1", "--rounds", "2"]
NAMES = ["eager", "stablekd", "stablekd-autograd", "floor"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench")
    words = [*QUICK, "--ops", "kd_loss", "--json", str(out / "rows.json"), "--csv", str(out / "rows.csv")]
    assert main(words) == 0
    return out


@pytest.mark.parametrize("op", CASES)
def test_all_contenders_of_the_small_cases_agree_with_float64(op):
    names = []
    for case in CASES[op](Setting(compile=False, quick=True)):
        check(case)
        names.append(case.name)
        found = [contender.name for contender in case.contenders]
        assert {case.baseline, "stablekd", "floor"} <= set(found)
    assert names and len(set(names)) == len(names) and all(name.startswith(op) for name in names)


def test_the_files_hold_rows_machine_versions_and_settings(measured):
    document = json.loads((measured / "rows.json").read_text())
    assert document.keys() == {"rows", "tables", "machine", "versions", "settings"}
    assert [row["contender"] for row in document["rows"]] == 2 * NAMES
    for row in document["rows"]:
        assert row["bench"] == "kernels" and row["case"].startswith("kd_loss 128x") and row["baseline"] == "eager"
        assert row["median_seconds"] > 0 and row["spread_seconds"] >= 0 and row["ratio"] > 0 and row["rounds"] == 2
    first = document["rows"][0]
    labels, logits = 128 * 8, 128 * 100 * 4
    assert first["ratio"] == 1.0 and first["bytes"] == 3 * logits + labels
    assert document["versions"]["torch"] == torch.__version__ and document["machine"]["cores"]
    assert document["settings"]["threads"] == 1 and document["settings"]["allocator"]
    with (measured / "rows.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [(row["case"], float(row["ratio"])) for row in table] == [(r["case"], r["ratio"]) for r in document["rows"]]


def test_a_wrong_operator_shows_no_speed_and_the_others_are_kept(monkeypatch, tmp_path, capsys):
    right = kernels.decoupled_kl_with_grad

    def wrong(*operands, **options):
        loss, gradient = right(*operands, **options)
        return loss, 1.001 * gradient

    monkeypatch.setattr(kernels, "decoupled_kl_with_grad", wrong)
    path = tmp_path / "rows.json"
    assert main([*QUICK, "--ops", "decoupled_kl,feature_cosine", "--json", str(path)]) == 2
    shown = capsys.readouterr()
    assert "decoupled_kl 128x1000 float32: stablekd is wrong" in shown.err and "result 1 is 0.001" in shown.err
    assert "decoupled_kl" not in shown.out and "feature_cosine" in shown.out
    assert {row["case"].split()[0] for row in json.loads(path.read_text())["rows"]} == {"feature_cosine"}


def test_a_ratio_that_is_too_low_fails(capsys):
    words = [*QUICK, "--ops", "kd_loss"]
    assert main([*words, "--fail-below", "0"]) == 0
    capsys.readouterr()
    assert main([*words, "--fail-below", "1e9"]) == 1
    assert "kd_loss 128x100 float32: stablekd is at" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ops", "kd_los"], "the nearest is 'kd_loss'"),
        (["--rounds", "0"], "rounds=0"),
        (["--against", "/no/rows.json"], "/no/rows.json cannot be read"),
        (["--quik"], "nearest valid name is --quick."),
        (["--aot", "--html", "page.html"], "--aot measures no time"),
    ],
)
def test_mistakes_are_one_clear_sentence(words, message, capsys):
    assert main([*QUICK, *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("stablekd: ") and len(error.splitlines()) == 1


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_rivals_agree_and_are_measured():
    generator = torch.Generator().manual_seed(0)
    student, target = (torch.randn(4, 3, 2, 2, generator=generator) for _ in range(2))
    loss = Loss("feature_mse", "tiny", student, (target,), mse, (target,))
    compiled = [row for row in measure(loss_case(loss, Setting()), 2) if row["contender"] == "compiled"]
    assert len(compiled) == 1 and compiled[0]["variant"] in ("autograd", "one graph")
