"""The objective gkd: the grouped divergence and the cross entropy, and a run by its name."""

import json

import pytest
import torch
from torch.nn import functional as F

from stablekd_fast import kernels
from stablekd_fast.errors import ConfigError
from stablekd_fast.objectives import objective
from stablekd_fast.run.distiller import distill


def logits(seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(8, 10, generator=generator) for _ in range(2))
    return student, teacher, torch.randint(10, (8,), generator=generator)


@pytest.mark.parametrize("soft", [False, True])
def test_it_is_the_divergence_and_the_cross_entropy(soft):
    student, teacher, labels = logits()
    labels = F.one_hot(labels, 10).float() * 0.7 + 0.03 if soft else labels
    options = dict(temperature=2.0, threshold=0.8, primary_weight=0.5, binary_weight=3.0, weight=0.25, ce_weight=2.0)
    leaf = student.clone().requires_grad_()
    divergence = kernels.grouped_kl(
        leaf, teacher, temperature=2.0, threshold=0.8, primary_weight=0.5, binary_weight=3.0
    )
    expected = 0.25 * divergence + 2 * F.cross_entropy(leaf, labels)
    (gradient,) = torch.autograd.grad(expected, leaf)
    gkd = objective("logits", "gkd", options)
    loss, own = gkd(student, teacher, labels)
    torch.testing.assert_close((loss, own), (expected.detach(), gradient))
    loss, own = gkd(student, teacher, labels, torch.tensor(8.0))
    torch.testing.assert_close((loss, own), (expected.detach(), 8 * gradient))


@pytest.mark.parametrize(
    "options, message", [(dict(threshold=1.0), "threshold=1.0"), (dict(temperature=0.0), "temperature=0.0")]
)
def test_what_cannot_be_is_said(options, message):
    with pytest.raises(ConfigError, match=message):
        objective("logits", "gkd", options)


def test_a_run_by_its_name(tmp_path):
    common = dict(data="digits", epochs=1, subset=320, batch_size=64, device="cpu", precision="fp32", progress=False)
    distill(method="ce", student="resnet8x4", out=str(tmp_path / "teacher"), **common)
    weights = str(tmp_path / "teacher" / "student.safetensors")
    distill(
        method="gkd", teacher="resnet8x4", teacher_weights=weights, student="resnet8", out=str(tmp_path / "student"),
        logits_options=dict(threshold=0.5), **common,
    )  # fmt: skip
    (run,) = json.loads((tmp_path / "student" / "results.json").read_text())["runs"]
    assert run["method"] == "gkd" and 0 < run["accuracy"] < 1
