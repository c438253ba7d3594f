"""Probes on frozen features, and students without a classifier that are evaluated from their files."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from stablekd_fast import cli, models
from stablekd_fast.config import DistillConfig
from stablekd_fast.data import Batch
from stablekd_fast.engine.checkpoint import save_tensors
from stablekd_fast.errors import ConfigError, DataError
from stablekd_fast.models.headless import named_network
from stablekd_fast.run.distiller import Distiller
from stablekd_fast.run.exported import evaluate_file, probe_file
from stablekd_fast.run.probes import features_of, linear, nearest_neighbours, probed, probes_named


@pytest.fixture
def clouds():
    """Features of three classes that overlap, and their labels: to learn from, and to tell."""
    rng = np.random.default_rng(0)
    centres = 1.3 * rng.standard_normal((3, 8))
    parts = []
    for count in (90, 1100):
        labels = rng.integers(0, 3, count)
        features = centres[labels] + rng.standard_normal((count, 8)) * np.linspace(0.5, 3, 8)
        parts.append((torch.tensor(features, dtype=torch.float32), torch.tensor(labels)))
    return parts


def test_neighbours_vote_by_their_cosines(clouds):
    (train, labels), (test, _) = clouds
    found = nearest_neighbours(train, labels, test)
    a, b = (x.numpy().astype(np.float64) for x in (train, test))
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    for row, cosines in enumerate(b @ a.T):
        votes = np.zeros(3)
        for place in np.argsort(-cosines)[:20]:
            votes[labels[place]] += np.exp(cosines[place] / 0.07)
        assert found[row] == votes.argmax()
    assert nearest_neighbours(train[:5], labels[:5], test).shape == (1100,), "fewer images than neighbours"


def test_a_linear_probe_is_a_regression_on_standardised_features(clouds):
    (train, labels), (test, truth) = clouds
    found = linear(1e3 * train + 5, labels, 1e3 * test + 5)
    mean, spread = train.numpy().mean(0), train.numpy().std(0, ddof=1)
    fitted = LogisticRegression(max_iter=1000).fit((train.numpy() - mean) / spread, labels.numpy())
    expected = fitted.predict((test.numpy() - mean) / spread)
    assert (found.numpy() == expected).mean() > 0.995 and (found == truth).double().mean() > 0.6
    with pytest.raises(DataError, match="at least two classes"):
        linear(train, torch.zeros(90, dtype=torch.int64), test)
    rows = probed(["linear", "knn"], *clouds)
    assert [row["probe"] for row in rows] == ["linear", "knn"]
    assert rows[0]["accuracy"] == pytest.approx((linear(train, labels, test) == truth).double().mean().item())
    assert (rows[0]["features"], rows[0]["learnt_from"], rows[0]["images"]) == (8, 90, 1100)


def test_features_of_tokens_and_maps_are_means_over_places():
    images, labels = torch.randn(4, 3, 2, 5), torch.arange(4)
    batches = [Batch(labels[:3], 0, images[:3], labels[:3]), Batch(labels[3:], 0, images[3:], labels[3:])]
    features, found = features_of(torch.nn.Identity(), batches, lambda x: x)
    torch.testing.assert_close(features, images.mean((2, 3)))
    assert torch.equal(found, labels)
    tokens, _ = features_of(torch.nn.Flatten(2), batches, lambda x: x)
    torch.testing.assert_close(tokens, images.flatten(2).mean(1))
    with pytest.raises(DataError, match="one class for each image"):
        features_of(torch.nn.Identity(), [Batch(labels, 0, images, torch.rand(4, 2))], lambda x: x)
    with pytest.raises(DataError, match="can be read"):
        features_of(torch.nn.Identity(), [], lambda x: x)


def test_probes_by_name():
    assert probes_named("linear, knn") == ["linear", "knn"]
    with pytest.raises(ConfigError, match="no probe 'knm'.*choose of knn, linear"):
        probes_named("knn,knm")


def test_a_student_its_checkpoint_and_a_teacher_are_probed(tmp_path, capsys):
    torch.manual_seed(0)
    settings = {
        "data": "digits", "teacher": "resnet20", "student": "resnet8", "head": "embedding", "epochs": 1.0,
        "subset": 200, "validation": 0, "precision": "fp32", "device": "cpu", "out": str(tmp_path / "run"),
    }  # fmt: skip
    Distiller(DistillConfig(**settings), teacher=named_network("resnet20", 10, 8, "embedding")).run(progress=False)
    student, checkpoint = (tmp_path / "run" / f"{name}.safetensors" for name in ("student", "checkpoint"))
    (one,), (other,) = (probe_file(file, ["knn"], images=150, device="cpu") for file in (student, checkpoint))
    assert one["accuracy"] == other["accuracy"] > 0.3 and one["learnt_from"] == 150 and one["features"] == 64
    with pytest.raises(ConfigError, match="without a classifier.*pass --probe"):
        evaluate_file(student)
    torch.manual_seed(0)
    teacher = models.build("resnet20", 10)
    save_tensors(tmp_path / "teacher.safetensors", teacher.state_dict(), {})
    typed = ["evaluate", str(tmp_path / "teacher.safetensors"), "--model", "resnet20", "--data", "digits"]
    assert cli.main([*typed, "--probe", "knn,linear", "--probe-images", "100", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "knn" in printed and "linear" in printed and "100" in printed and "359" in printed
    assert cli.main([*typed, "--probe-images", "100"]) == 2
    assert "without --probe" in capsys.readouterr().err
