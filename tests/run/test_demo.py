"""The demonstration: its images, its teacher, its page."""

import dataclasses
import hashlib
import json
import re

import pytest
import torch

from stablekd_fast import evaluate_file
from stablekd_fast.data import open_dataset
from stablekd_fast.data.dataset import FASHION
from stablekd_fast.errors import ConfigError
from stablekd_fast.models.weights import card_of
from stablekd_fast.report.html import found_in
from stablekd_fast.run import demo


def test_the_embedded_images_are_balanced_and_those_that_were_taken():
    data = open_dataset("fashion-mnist-small")
    assert data.classes[0] == "t-shirt" and len(data.classes) == 10
    assert data.train.images.shape == (5000, 28, 28, 3) and data.test.images.shape == (2000, 28, 28, 3)
    assert data.train.labels.bincount().tolist() == [500] * 10 and data.test.labels.bincount().tolist() == [200] * 10
    assert data.augmentation.flip and data.augmentation.padding == 2
    gray = torch.cat([data.train.images, data.test.images])
    assert torch.equal(gray[..., 0], gray[..., 1]) and torch.equal(gray[..., 0], gray[..., 2])
    told = hashlib.blake2b(gray[..., 0].contiguous().numpy().data, digest_size=8).hexdigest()
    assert told == "5326440b9bfe28b4", "these are not the images that were chosen"
    assert FASHION.stat().st_size < 4e6
    assert "Zalando" in FASHION.with_name("LICENSE").read_text()


def test_the_embedded_teacher_is_as_good_as_its_card_says():
    card = card_of(demo.FASHION_TEACHER)
    assert card["data"] == "fashion-mnist" and card["classes"] == open_dataset("fashion-mnist-small").classes
    found = evaluate_file(demo.FASHION_TEACHER, data="fashion-mnist-small")
    assert found.images == 2000 and abs(found.accuracy - card["accuracy"]) < 0.02 and found.accuracy > 0.9
    assert demo.FASHION_TEACHER.stat().st_size < 2.5e6


RUNS = [
    {
        "method": "kd",
        "seed": 0,
        "accuracy": 0.70,
        "epochs": 1,
        "steps": 2,
        "images_per_second": 5,
        "wall_seconds": 11.0,
    },
    {
        "method": "kd",
        "seed": 1,
        "accuracy": 0.72,
        "epochs": 1,
        "steps": 2,
        "images_per_second": 5,
        "wall_seconds": 13.0,
    },
    {"method": "x", "seed": 0, "accuracy": 0.80, "epochs": 1, "steps": 2, "images_per_second": 5, "wall_seconds": 9.0},
]


def test_what_was_found_is_said_whoever_wins():
    lead, rest = found_in(RUNS, "Two epochs").split("; ")
    assert lead == "Two epochs: students trained by x got the most test images right, 80.0% in 9 s"
    assert rest == "kd 71.0% ± 1.4 in 12 s."
    worse = [{**run, "accuracy": 0.5} if run["method"] == "x" else run for run in RUNS]
    assert "students trained by kd got the most test images right, 71.0% ± 1.4 in 12 s; x 50.0% in 9 s" in found_in(
        worse, "Two epochs"
    )
    assert found_in(RUNS[:1], "One").endswith("by kd got the most test images right, 70.0% in 11 s.")


def _without(settings, names):
    return {name: value for name, value in settings.items() if name not in names}


@pytest.mark.parametrize("data", list(demo.DEMONSTRATIONS))
def test_the_demonstration_in_small(data, tmp_path, monkeypatch):
    """The whole way, with few images and epochs."""
    asked = demo.DEMONSTRATIONS[data]
    small = {"subset": 96.0, "epochs": 1.0, "bn_images": 64, "batch_size": 32, "validation": 64.0, "log_every": 1}
    own = dataclasses.replace(
        asked,
        common={**asked.common, **small},
        methods={name: _without(own, small) for name, own in asked.methods.items()},
        teacher_epochs=asked.teacher_epochs and 1,
    )
    monkeypatch.setitem(demo.DEMONSTRATIONS, data, own)
    runs = demo.run_demo(tmp_path, data=data, seeds=1, device="cpu")
    assert [run["method"] for run in runs] == list(asked.methods)
    assert json.loads((tmp_path / "results.json").read_text())["runs"] == json.loads(json.dumps(runs))
    page = (tmp_path / "report.html").read_text()
    sentence = re.search(r"<h2>(.*?)</h2>", page)
    assert sentence and "got the most test images right" in sentence[1] and asked.about in sentence[1]
    assert page.index("seconds of training") < page.index("Mean ± sample standard deviation")


def test_there_is_no_demonstration_of_other_data(tmp_path):
    with pytest.raises(ConfigError, match="no demonstration of 'cifar10'.*digits"):
        demo.run_demo(tmp_path, data="cifar10")
    assert not any(tmp_path.iterdir())
