"""The campaigns over the methods of the field and over attacks, in small: what they train, how they attack, and what
their tables say."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from stablekd_fast import models
from stablekd_fast.bench.campaigns import methods, robustness
from stablekd_fast.data import open_dataset

SMALL = ["--data", "digits", "--student", "resnet8", "--subset", "64", "--validation", "16", "--epochs", "1"]
SMALL += ["--batch-size", "16", "--seeds", "1", "--threads", "1"]


@pytest.fixture
def teacher(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "teacher.safetensors"
    save_file(models.build("resnet8", 10, 8).state_dict(), path)
    return ["--teacher", "resnet8", "--teacher-weights", str(path)]


def test_each_method_is_told_beside_labels_alone_and_beside_kd(tmp_path, teacher):
    words = [*SMALL, *teacher, "--methods", "ce", "kd", "mix-kd", "--out", str(tmp_path / "out")]
    methods.main(words)
    rows = json.loads((tmp_path / "out" / "methods.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["ce", "kd", "mix-kd"]
    config = json.loads((tmp_path / "out" / "mix-kd-0" / "results.json").read_text())
    assert (
        config["runs"][0]["steps"] * 2
        == json.loads((tmp_path / "out" / "kd-0" / "results.json").read_text())["runs"][0]["steps"]
    )


def test_gains_are_means_over_the_seeds_that_both_have():
    found = {"ce": {0: 0.5, 1: 0.6}, "kd": {0: 0.55, 1: 0.61}, "at": {1: 0.7}}
    ce, kd, at = methods.table(found)
    assert "above ce" not in ce and ce["above kd"] == pytest.approx(-3.0)
    assert kd["above ce"] == pytest.approx(3.0) and kd["spread above ce"] == pytest.approx(2 * 2**0.5)
    assert at["above kd"] == pytest.approx(9.0) and at["spread above kd"] is None


@pytest.mark.parametrize("steps", [1, 10])
def test_an_attack_stays_near_and_raises_the_loss(steps):
    dataset, device = open_dataset("digits"), torch.device("cpu")
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 10)).eval()
    attack = robustness.Attack(dataset, device)
    images, labels = next(
        iter(robustness.batches_of(dataset.test.images, dataset.test.labels, torch.arange(64), 64, device))
    )
    moved = attack.moved(network, images, labels, 4 / 255, steps)
    assert (moved - images).abs().max() <= 4 / 255 + 1e-6 and moved.min() >= 0 and moved.max() <= 1
    losses = [F.cross_entropy(network(attack.normalised(one)), labels).item() for one in (images, moved)]
    assert losses[1] > losses[0] + 0.01


def test_both_methods_are_attacked_in_the_end(tmp_path, teacher):
    words = [*SMALL, *teacher, "--robust-epochs", "1", "--attacked", "32", "--out", str(tmp_path / "out")]
    robustness.main(words)
    found = json.loads((tmp_path / "out" / "robustness.json").read_text())
    assert [(row["method"], row["seed"]) for row in found["rows"]] == [("teacher", 0), ("kd", 0), ("kdiga", 0)]
    assert [row["images"] for row in found["gains"]] == [
        "clean",
        *(f"{kind} {far}" for far in (1, 2, 4) for kind in ("FGSM", "PGD")),
    ]
