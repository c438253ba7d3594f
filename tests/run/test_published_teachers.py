"""Runs whose teacher has published weights: its classes, its images, and what of it goes on the student's card."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from stablekd_fast.config import DistillConfig
from stablekd_fast.errors import ConfigError, ModelError
from stablekd_fast.models.weights import card_of
from stablekd_fast.run.distiller import Distiller, distill

timm = pytest.importorskip("timm")
NAMES = ["ant", "bee", "cat"]


@pytest.fixture
def folder(tmp_path):
    """A repository of timm for images of 48 pixels that are normalised in a way of its own."""
    torch.manual_seed(2)
    data = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "input_size": (3, 48, 48)}
    model = timm.create_model("test_resnet", num_classes=3, pretrained_cfg_overlay=data)
    timm.models.save_for_hf(
        model, str(tmp_path / "repository"), safe_serialization=True, model_config={"label_names": NAMES}
    )
    return tmp_path / "repository"


def write(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)


@pytest.fixture
def settings(tmp_path, folder):
    for number in range(40):
        write(tmp_path / "photos" / f"{number}.png", number)
    return {
        "data": str(tmp_path / "photos"), "teacher": f"hf:{folder}", "student": "resnet8", "method": "kd", "epochs": 1,
        "batch_size": 16, "validation": 4, "bn_images": 16, "precision": "fp32", "device": "cpu",
        "out": str(tmp_path / "run"),
    }  # fmt: skip


def test_a_published_teacher_brings_its_classes_and_gets_its_own_images(settings, folder, tmp_path, one_thread):
    found = Distiller(DistillConfig(**settings)).materials
    assert found.images.dataset.classes == NAMES
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = found.images.first(torch.device("cpu"))
    mean, std = (torch.tensor(v)[:, None, None] for v in (found.images.dataset.mean, found.images.dataset.std))
    pixels = torch.nn.functional.interpolate(images * std + mean, (48, 48), mode="bilinear", antialias=True)
    own_mean, own_std = (torch.tensor(v)[:, None, None] for v in ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)))
    with torch.no_grad():
        served = found.paired.teacher_outputs(images)[len(found.paired) - 1]
        torch.testing.assert_close(served, model((pixels - own_mean) / own_std), rtol=1e-4, atol=1e-5)
    distill(**settings, progress=False)
    assert card_of(tmp_path / "run" / "student.safetensors")["classes"] == NAMES


def test_labelled_images_of_other_classes_are_refused(settings, tmp_path):
    for part in ("train", "test"):
        for number in range(40):
            write(tmp_path / "set" / part / f"c{number % 2}" / f"{number}.png", number)
    with pytest.raises(ModelError, match="tells 3 classes apart, but the data set has 2"):
        _ = Distiller(DistillConfig(**{**settings, "data": str(tmp_path / "set")})).materials


def test_a_teacher_without_a_classifier_is_refused(settings):
    with pytest.raises(ModelError, match="has no classifier"):
        _ = Distiller(DistillConfig(**{**settings, "teacher": "timm/vit_small_patch14_dinov2@pretrained"})).materials


def test_weights_are_asked_for_once(settings):
    with pytest.raises(ConfigError, match="give one of the two"):
        _ = Distiller(DistillConfig(**settings, teacher_weights="a.pth")).materials


def test_a_student_may_begin_from_published_weights(settings, folder, tmp_path, one_thread):
    settings |= {"student": f"hf:{folder}", "image_size": 48, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = Distiller(DistillConfig(**settings)).materials
    own = timm.create_model(f"local-dir:{folder}", pretrained=True).state_dict()
    assert all(torch.equal(own[key], value) for key, value in found.paired.student.state_dict().items())
