"""`stablekd info --selftest` passes here, and fails where an essential claim does not hold."""

import json

import pytest
import torch

from stablekd_fast import kernels
from stablekd_fast.cache.store import RowStore
from stablekd_fast.cli import main
from stablekd_fast.engine.step import GroupStep
from stablekd_fast.selftest import CLAIMS, selftest

CPU = torch.device("cpu")


def results(words):
    """Rows of the claims whose names hold one of the words."""
    rows = [claim.row(CPU) for claim in CLAIMS if any(word in claim.name for word in words)]
    assert rows
    return rows


def alone(monkeypatch, word):
    """The command with these claims only."""
    monkeypatch.setattr("stablekd_fast.selftest.CLAIMS", [claim for claim in CLAIMS if word in claim.name])
    return main(["info", "--selftest", "--device", "cpu"])


def test_all_claims_hold_here_and_nothing_is_disturbed(capsys):
    random = torch.get_rng_state()
    rows = selftest(CPU)
    assert torch.equal(random, torch.get_rng_state())
    assert {row["result"] for row in rows} <= {"pass", "not here"}, rows
    for row in rows:
        assert row["what was found"]
        if row["result"] == "not here":
            assert row["claim"].startswith(("NVIDIA", "DALI")) or "needs" in row["what was found"], row


def test_the_command_says_so(monkeypatch, capsys):
    assert alone(monkeypatch, "augment_batch") == 0
    assert "self-test on cpu" in capsys.readouterr().out
    assert main(["info"]) == 0
    assert "self-test" not in capsys.readouterr().out
    assert main(["info", "--selftest", "--device", "quantum"]) == 2


@pytest.mark.parametrize(
    "operator",
    [
        "kd_loss_with_grad",
        "decoupled_kl_with_grad",
        "grouped_kl_with_grad",
        "correlation_with_grad",
        "standardised_kd_loss_with_grad",
        "feature_mse_with_grad",
        "feature_cosine_with_grad",
        "attention_transfer_with_grad",
    ],
)
@pytest.mark.parametrize("place", [0, 1], ids=["loss", "gradient"])
def test_a_loss_that_is_wrong_by_a_thousandth_fails(monkeypatch, operator, place):
    right = getattr(kernels, operator)

    def wrong(*arguments, **settings):
        found = list(right(*arguments, **settings))
        found[place] = found[place] * 1.001
        return tuple(found)

    monkeypatch.setattr(kernels, operator, wrong)
    name = operator.removesuffix("_with_grad")
    rows = [row for row in results([name]) if row["claim"].startswith(name)]  # some names end like others
    assert {row["result"] for row in rows} == {"fail"}
    assert all("from float32; at most 1e-05 is allowed" in row["what was found"] for row in rows)


@pytest.mark.parametrize("operator", ["dequantize_rows", "augment_batch"])
def test_an_operator_that_is_off_by_one_bit_fails_the_command(monkeypatch, capsys, operator):
    right = getattr(kernels, operator)

    def wrong(*arguments, **settings):
        found = right(*arguments, **settings)
        found.view(-1 if found.is_contiguous() else found.shape)[0] *= 1 + 2 * torch.finfo(found.dtype).eps
        return found

    monkeypatch.setattr(kernels, operator, wrong)
    assert alone(monkeypatch, operator) == 1
    assert "differs from" in " ".join(capsys.readouterr().out.split())


def test_a_step_that_replays_differently_fails_the_command(monkeypatch, capsys):
    def by_a_python_number(step):
        step.turn = getattr(step, "turn", 0) + 1
        step.lr.fill_(0.01 * step.turn)

    monkeypatch.setattr(GroupStep, "take_rates", by_a_python_number)
    rows = results(["captured steps"])
    assert {row["result"] for row in rows} == {"fail"}
    assert all("emulate differs from eager steps by up to" in row["what was found"] for row in rows)
    assert alone(monkeypatch, "SGD, fp32") == 1


def test_a_claim_that_raises_is_a_failure_with_the_first_line_of_its_error(monkeypatch, capsys):
    def broken(*_, **__):
        raise RuntimeError("the disk [/dev/sda] is gone\nand more")

    monkeypatch.setattr(RowStore, "gather", broken)
    (row,) = results(["stored row"])
    assert (row["result"], row["what was found"]) == ("fail", "RuntimeError: the disk [/dev/sda] is gone")
    assert alone(monkeypatch, "stored row") == 1
    assert "[/dev/sda]" in " ".join(capsys.readouterr().out.split())


def test_a_float16_gradient_that_loses_elements_fails(monkeypatch):
    """Scaled when it is rounded already."""
    right = kernels.feature_mse_with_grad

    def wrong(student, target, *, upstream, **settings):
        loss, gradient = right(student, target, **settings)
        return loss * upstream, (gradient.float() * upstream).to(gradient.dtype)

    monkeypatch.setattr(kernels, "feature_mse_with_grad", wrong)
    (row,) = results(["float16"])
    assert row["result"] == "fail" and "of the elements are lost" in row["what was found"]


@pytest.mark.dali
def test_a_source_that_is_not_read_alone_and_gives_other_images_fails(monkeypatch):
    """One pipeline for all iterations, as it was once."""
    from stablekd_fast.data import dali

    made = []
    board = dali.DaliDecoder._pipeline

    def shared(decoder):
        if not made or made[-1][0] is not decoder:
            made.append((decoder, board(decoder)))
        return made[-1][1]

    monkeypatch.setattr(dali.DaliDecoder, "_pipeline", shared)
    monkeypatch.setattr(dali._Pipeline, "drain", lambda pipeline: None)
    (row,) = results(["read twice"])
    assert row["result"] == "fail", row


def test_the_file_for_a_report_holds_where_a_claim_failed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(RowStore, "gather", lambda *_: [][1])
    monkeypatch.setattr("stablekd_fast.selftest.CLAIMS", [claim for claim in CLAIMS if "stored row" in claim.name])
    file = tmp_path / "report.json"
    assert main(["info", "--selftest", "--device", "cpu", "--json", str(file)]) == 1
    said = "".join(capsys.readouterr().out.split())  # long paths are folded
    assert f"1of1claimsdonotholdonthismachine.Toreportit,sendthefile{file}:" in said
    found = json.loads(file.read_text())
    assert found["machine"]["cpu"] and found["versions"]["torch"] == torch.__version__ and found["operators"]
    (row,) = found["selftest"]
    assert row["result"] == "fail" and "IndexError" in row["what was found"] and "test_selftest.py" in row["traceback"]
    assert {"claim", "how it was checked", "what was found", "result"} < row.keys()


def test_a_row_that_comes_back_otherwise_fails(monkeypatch):
    right = RowStore.gather
    monkeypatch.setattr(RowStore, "gather", lambda *arguments: [part + 0.0 for part in right(*arguments)])
    (row,) = results(["stored row"])
    assert row["result"] == "fail"
