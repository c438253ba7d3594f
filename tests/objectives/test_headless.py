"""Pairs without a classifier: losses by their formulas; whole runs that are captured, cached, interrupted."""

import json
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from stablekd_fast import models
from stablekd_fast.blocks.layout import Resampling, layout_of
from stablekd_fast.cache import CacheSettings
from stablekd_fast.config import DistillConfig, objectives_of
from stablekd_fast.data import open_dataset
from stablekd_fast.engine.checkpoint import load_tensors
from stablekd_fast.errors import ConfigError, CutError
from stablekd_fast.models.headless import named_network, without_classifier
from stablekd_fast.objectives import Facts, StepBatch
from stablekd_fast.objectives.embedding import Embedding, EmbeddingLoss, Relational, RelationalLoss
from stablekd_fast.run.distiller import Distiller

N = 6


def facts(own, theirs, places=None):
    return Facts(
        classes=0, samples=20, batch_size=N, size=(32, 32), student_shapes=[own], teacher_shapes=[theirs],
        channel_axes=[], device=torch.device("cpu"), places=places,
    )  # fmt: skip


def vectors(width):
    return torch.randn(N, width, dtype=torch.float64, requires_grad=True)


def loss_of(module, student, teacher):
    return module.double()(StepBatch(student, {0: teacher.detach()}, None), {0: student}, None)


@pytest.mark.parametrize("loss", ["mse", "cosine"])
def test_the_loss_of_an_embedding_is_its_formula_behind_a_learned_map(loss):
    module = EmbeddingLoss(Embedding(loss=loss, weight=3.0), facts((4,), (5,)))
    student, teacher = vectors(4), vectors(5)
    found = loss_of(module, student, teacher)
    weight, bias = (p.detach().numpy() for p in module.projector.parameters())
    s, t = student.detach().numpy() @ weight.T + bias, teacher.detach().numpy()
    if loss == "mse":
        expected = (((s - t) ** 2).sum(1) / (t**2).sum(1)).mean()
    else:
        expected = (1 - (s * t).sum(1) / np.linalg.norm(s, axis=1) / np.linalg.norm(t, axis=1)).mean()
    assert found.item() == pytest.approx(3 * expected, rel=1e-12)
    found.backward()
    assert module.projector.weight.grad.abs().max() > 0 and student.grad.abs().max() > 0


def test_a_loss_of_relations_compares_the_cosines_of_pairs():
    student, teacher = vectors(4), vectors(7)
    module = RelationalLoss(Relational(weight=2.0), facts((4,), (7,)))
    found = loss_of(module, student, teacher)
    s, t = (x.detach().numpy() / np.linalg.norm(x.detach().numpy(), axis=1, keepdims=True) for x in (student, teacher))
    pairs = [((s[i] @ s[j]) - (t[i] @ t[j])) ** 2 for i in range(N) for j in range(N) if i != j]
    assert found.item() == pytest.approx(2 * np.mean(pairs), rel=1e-12)
    assert not list(module.parameters())


def test_equal_widths_need_no_projector_unless_it_is_asked_for():
    student = vectors(4)
    module = EmbeddingLoss(Embedding(), facts((4,), (4,)))
    assert not list(module.parameters()) and loss_of(module, student, student).item() == 0
    assert list(EmbeddingLoss(Embedding(projector="linear"), facts((4,), (4,))).parameters())


def test_tokens_are_brought_to_the_places_of_the_student_s_map():
    own, theirs = layout_of((3, 2, 2), 1, (32, 32)), layout_of((17, 5), -1, (32, 32))
    module = EmbeddingLoss(Embedding(), facts((3, 2, 2), (17, 5), Resampling(theirs, own)))
    student, teacher = torch.randn(N, 3, 2, 2), torch.randn(N, 17, 5)
    mapped, wanted = module.compared(student, teacher)
    grid = teacher[:, 1:].reshape(N, 4, 4, 5)  # the first of 17 tokens leads
    means = torch.stack([grid[:, i : i + 2, j : j + 2].mean((1, 2)) for i in (0, 2) for j in (0, 2)], 1)
    torch.testing.assert_close(wanted, means)
    torch.testing.assert_close(mapped, module.projector(student.flatten(2).movedim(1, 2)))


# Whole runs.

SETTINGS = {
    "data": "digits", "teacher": "resnet20", "student": "resnet20_half", "epochs": 2.0, "subset": 64, "batch_size": 16,
    "validation": 32, "bn_images": 16, "views": 1, "precision": "fp32", "device": "cpu", "evaluate_every": 1.0,
    "log_every": 1,
}  # fmt: skip


def backbone(name, seed=0):
    torch.manual_seed(seed)
    return named_network(name, 10, 8, "embedding")


def make(folder, teacher=None, student=None, dataset=None, **changed):
    config = DistillConfig(**{**SETTINGS, "out": str(folder), **changed})
    return Distiller(config, teacher=teacher or backbone("resnet20"), student=student, dataset=dataset)


def finished(distiller):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".* rests in stage")
        result = distiller.run(progress=False)
    return result, load_tensors(distiller.checkpoint)[0]


RUNS = {
    "embedding": {"head": "embedding"},
    "none": {"head": "none"},
    "none, ends": {"head": "none", "align": "ends"},
    "end to end": {"head": "embedding", "method": "kd", "auxiliary_options": {"loss": "cosine"}},
    "relations": {"head": "embedding", "method": "kd", "auxiliary": "relational"},
    "hints": {"head": "none", "method": "fitnet"},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_gives_the_bits_of_its_eager_one(tmp_path, name):
    """Captured (emulated), with the teacher's outputs from a cache, and interrupted in its second epoch."""
    result, expected = finished(make(tmp_path / "plain", capture="eager", **RUNS[name]))
    cache = CacheSettings(plan="all", directory=str(tmp_path / "rows"))
    other = {"capture": "emulate", "cache": cache, "checkpoint_every": 3, **RUNS[name]}
    first = make(tmp_path / "other", **other)
    assert first.parts.stages[-1].last == 8
    stream = first.parts.stream

    def dying(*args, batches=stream.batches, **kwargs):
        for number, batch in enumerate(batches(*args, **kwargs)):
            if number == 6 or (first.parts.stages[0].last == 6 and args[0] == 6):
                raise KeyboardInterrupt
            yield batch

    stream.batches = dying
    with pytest.raises(KeyboardInterrupt):
        first.run(progress=False)
    again, found = finished(make(tmp_path / "other", resume=True, **other))
    assert found.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []
    assert (again.cosine, again.relative_error) == (result.cosine, result.relative_error)
    kept = {path.name for path in (tmp_path / "rows").iterdir() if path.is_dir()}
    assert any(folder.startswith("embedding") for folder in kept) == (RUNS[name]["head"] == "embedding")
    assert not any(folder.startswith("logits") for folder in kept)


def test_what_a_run_leaves_behind_says_what_was_measured(tmp_path):
    result, _ = finished(make(tmp_path, head="embedding"))
    assert result.accuracy is None and result.top5 is None and -1 <= result.cosine <= 1
    (run,) = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert run["cosine"] == result.cosine and not {"accuracy", "top5", "ranking"} & run.keys()
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    evaluations = [event for event in events if event["kind"] == "evaluate"]
    assert [event["split"] for event in evaluations] == ["validation", "validation", "test"]
    assert all("accuracy" not in event and event["relative_error"] > 0 for event in evaluations)
    page = (tmp_path / "report.html").read_text()
    assert "Cosine with the teacher" in page and "Validation cosine over epochs" in page and " accuracy" not in page
    tensors, card = load_tensors(tmp_path / "student.safetensors")
    assert tensors.keys() == backbone("resnet20_half").state_dict().keys(), "neither projector nor classifier"
    assert card["head"] == "embedding" and card["cosine"] == result.cosine and "accuracy" not in card


@pytest.mark.parametrize("name, end", [("embedding", "embedding"), ("none", "layer3")])
def test_a_merge_is_measured_by_the_losses_of_the_run(tmp_path, name, end):
    distiller = make(tmp_path, **RUNS[name])
    finished(distiller)
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    (merge,) = (event for event in events if event["kind"] == "merge")
    assert list(merge["exposure_gap"]) == ["layer2", end] and all(gap > 0 for gap in merge["exposure_gap"].values())
    first = next(e["losses"]["1+2+3+4"] for e in events if e["kind"] == "train" and "1+2+3+4" in e["losses"])
    assert merge["loss_at_merge"]["1+2+3+4"] == pytest.approx(first, rel=0.25), "the same losses, on other images"


@pytest.mark.parametrize("head", ["embedding", "none"])
def test_no_label_is_read(tmp_path, head):
    """Training images of other classes give the same bits."""
    found = []
    for turn in range(2):
        dataset = open_dataset("digits")
        if turn:
            dataset.train.labels.copy_(9 - dataset.train.labels)
        parts = make(tmp_path / str(turn), dataset=dataset, head=head, subset=None, epochs=0.1, validation=0)
        found.append(finished(parts)[1])
    assert all(torch.equal(found[0][name], value) for name, value in found[1].items())


def test_training_brings_the_student_nearer_to_its_teacher(tmp_path):
    for head, method in (("embedding", "stablekd"), ("none", "blocks")):
        distiller = make(tmp_path / head, head=head, method=method, subset=None, epochs=4.0, validation=0)
        result, _ = finished(distiller)
        assert result.relative_error < 0.25 and result.cosine > 0.97, head


class Mapped(nn.Module):
    """A convolution, and what it gives as a map or as tokens."""

    def __init__(self, width, stride, tokens):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 1, 1)
        self.body = nn.Conv2d(width, width, 3, stride, 1)
        self.tokens = tokens

    def forward(self, x):
        x = self.body(torch.relu(self.stem(x)))
        return x.flatten(2).movedim(1, 2) if self.tokens else x


def test_maps_are_compared_with_tokens_of_another_grid(tmp_path):
    torch.manual_seed(0)
    teacher, student = Mapped(6, 1, tokens=True), Mapped(4, 2, tokens=False)
    result, tensors = finished(make(tmp_path, teacher, student, head="embedding", method="kd", epochs=4.0))
    assert result.relative_error < 1 and tensors["auxiliary/projector.weight"].shape == (6, 4)


def test_a_teacher_by_name_loses_its_classifier_whatever_its_classes_are(tmp_path):
    torch.manual_seed(0)
    network = models.build("resnet20", 7)  # of other classes than the data
    torch.save(network.state_dict(), tmp_path / "teacher.pt")
    config = DistillConfig(
        **{**SETTINGS, "epochs": 1.0, "head": "embedding", "teacher_weights": str(tmp_path / "teacher.pt"),
           "out": str(tmp_path / "run")}
    )  # fmt: skip
    distiller = Distiller(config)
    without_classifier(network)
    taken = distiller.paired.teacher.state_dict()
    assert taken.keys() == network.state_dict().keys()
    assert all(torch.equal(value, taken[name]) for name, value in network.state_dict().items())
    finished(distiller)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"head": "embedding", "method": "ce"}, "has no teacher"),
        ({"head": "embedding", "method": "dkd"}, r"compares logits \(dkd\)"),
        ({"head": "embedding", "logits": "kd"}, r"compares logits \(kd\)"),
        ({"head": "embedding", "method": "cckd"}, "cckd reads the networks' last output as that of head=classifier"),
        ({"head": "embedding", "method": "fitnet"}, "has no loss of the embedding"),
        ({"head": "none", "method": "kd"}, "has no loss at a cut"),
        ({"head": "none", "auxiliary": "embedding"}, "reads the networks' last output as that of head=embedding"),
        ({"head": "embedding", "synthesis": "fast-dfkd"}, "makes its images by the teacher's logits"),
        ({"head": "embedding", "auxiliary_options": {"loss": "l1"}}, "loss='l1' was given; choose one of mse, cosine"),
        ({"head": "embedding", "auxiliary": "relational", "accumulate": 2}, "compares the samples of a batch"),
    ],
)
def test_a_method_that_does_not_fit_is_refused_in_a_sentence(tmp_path, settings, said):
    with pytest.raises(ConfigError, match=said):
        _ = make(tmp_path, **settings).decided


def test_other_settings_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="cache.logits=top10 was given, but head=embedding leaves no logits"):
        DistillConfig(head="embedding", cache=CacheSettings(logits="top10"))
    with pytest.raises(ConfigError, match="reads the networks' last output as that of head=embedding"):
        objectives_of(DistillConfig(auxiliary="relational"))
    with pytest.raises(ConfigError, match="head='all' was given"):
        DistillConfig(head="all")
    with pytest.raises(CutError, match="behind layer2, without a loss, but it has weights"):
        _ = make(tmp_path, head="none", cuts=["layer1", "layer2"]).materials
    with pytest.raises(ConfigError, match=r"embedding is \[32\] per image and the teacher's \[6, 8, 8\]"):
        _ = make(tmp_path, Mapped(6, 1, tokens=False), head="embedding", method="kd").decided
