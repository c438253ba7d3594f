"""Runs on images without labels: what is learned, what is measured, and what is refused."""

import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from stablekd_fast import black_box, cli, models
from stablekd_fast.cache.settings import CacheSettings
from stablekd_fast.config import DistillConfig, losses_of, objectives_of
from stablekd_fast.data import open_dataset
from stablekd_fast.engine.checkpoint import save_tensors
from stablekd_fast.engine.schedule import Optimizer
from stablekd_fast.errors import CacheError, CheckpointError, ConfigError, ModelError
from stablekd_fast.models.weights import card_of
from stablekd_fast.objectives.methods import METHODS
from stablekd_fast.objectives.registry import _REGISTRY, objective
from stablekd_fast.run.distiller import Distiller, distill
from stablekd_fast.run.exported import evaluate_file
from stablekd_fast.run.unlabelled import NEED_LABELS, without_labels

CLASSES = 7


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "photos"
    for number in range(60):
        path = folder / f"{number % 4}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    safetensors.torch.save_file(models.build("resnet14", CLASSES).state_dict(), path)
    return path


@pytest.fixture
def settings(photos, weights, tmp_path):
    return {
        "data": str(photos), "teacher": "resnet14", "teacher_weights": str(weights), "student": "resnet8",
        "epochs": 1, "batch_size": 16, "validation": 8, "bn_images": 16, "precision": "fp32", "device": "cpu",
        "out": str(tmp_path / "run"),
    }  # fmt: skip


def events(folder, kind):
    lines = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    return [event for event in lines if event["kind"] == kind]


def test_a_run_measures_agreement_with_the_teacher(settings, tmp_path, one_thread):
    with pytest.warns(UserWarning, match="cross entropy with them is left out") as told:
        result = distill(**settings, progress=False)
    assert any("60 images without labels" in str(warning.message) for warning in told)
    assert result.truth == "teacher" and json.loads((tmp_path / "run/results.json").read_text())["runs"][0]["truth"]
    assert [event["truth"] for event in events(tmp_path / "run", "evaluate")] == ["teacher", "teacher"]
    assert not events(tmp_path / "run", "teacher")
    assert events(tmp_path / "run", "data")[0]["labelled"] is False
    card = card_of(tmp_path / "run/student.safetensors")
    assert card["classes"] == [str(number) for number in range(CLASSES)]
    assert card["agreement"] == result.accuracy and "accuracy" not in card
    assert "These images have no labels" in (tmp_path / "run/report.html").read_text()
    # The agreement is that of teacher and exported student on the test images, by hand.
    test = open_dataset(settings["data"]).test
    student, teacher = models.build("resnet8", CLASSES), models.build("resnet14", CLASSES)
    models.load_weights(student, tmp_path / "run/student.safetensors")
    models.load_weights(teacher, settings["teacher_weights"])
    images = test.images.permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(card[name])[:, None, None] for name in ("mean", "std"))
    with torch.no_grad():
        first = [network.eval()((images - mean) / std).argmax(1) for network in (student, teacher)]
    assert result.accuracy == pytest.approx((first[0] == first[1]).float().mean().item())


def test_a_student_of_the_teacher_itself_agrees(settings, weights, one_thread):
    settings |= {"student": "resnet14", "student_weights": str(weights), "method": "kd", "bn_images": 0}
    still = Optimizer(lr=1e-9, weight_decay=0.0)
    assert distill(**settings, optimizer=still, progress=False).accuracy == 1.0


def test_a_run_goes_on_and_keeps_rows(settings, tmp_path, one_thread):
    cache = CacheSettings(directory=str(tmp_path / "rows"), disk_budget="1GB", plan="all")
    settings |= {"cache": cache, "views": 1, "epochs": 2, "method": "kd"}
    whole = distill(**settings, progress=False)
    again = distill(**{**settings, "out": str(tmp_path / "again")}, progress=False)
    assert again.accuracy == whole.accuracy
    served = events(tmp_path / "again", "cache")[0]
    assert served["rows"]
    resumed = Distiller(DistillConfig(**settings, resume=True)).run(progress=False)
    assert resumed.accuracy == whole.accuracy
    other = tmp_path / "other"
    shutil.copytree(settings["data"], other)
    Image.new("RGB", (16, 16)).save(open_dataset(other).train.paths[0])
    settings |= {"data": str(other)}
    with pytest.raises((CacheError, CheckpointError)):
        distill(**{**settings, "resume": True}, progress=False)
    with pytest.raises(CacheError, match="were made for something else"):
        distill(**{**settings, "out": str(tmp_path / "third")}, progress=False)


def test_images_are_mixed_without_labels(settings, one_thread):
    assert distill(**settings, mix="mixup", method="kd", progress=False).truth == "teacher"


def test_unlabelled_images_beside_labelled_ones_are_tested_by_labels(settings, photos, tmp_path, one_thread):
    for part in ("train", "test"):
        for label in range(CLASSES):
            path = tmp_path / "set" / part / f"c{label}" / "0.png"
            path.parent.mkdir(parents=True)
            Image.new("RGB", (16, 16), (20 * label, 1, len(part))).save(path)
    result = distill(**{**settings, "data": f"{tmp_path / 'set'},{photos}"}, progress=False)
    assert result.truth == "labels"
    truths = {event["split"]: event["truth"] for event in events(tmp_path / "run", "evaluate")}
    assert truths == {"validation": "teacher", "test": "labels"}


@pytest.mark.parametrize("kind", ["module", "black box", "card"])
def test_classes_are_those_of_the_teacher(settings, tmp_path, weights, kind, one_thread):
    settings |= {"method": "kd"}
    if kind == "card":
        named = tmp_path / "named.safetensors"
        names = [f"animal {number}" for number in range(CLASSES)]
        save_tensors(named, models.build("resnet14", CLASSES).state_dict(), {"format": 1, "classes": names})
        found = Distiller(DistillConfig(**{**settings, "teacher_weights": str(named)})).materials
        assert found.images.dataset.classes == names
        return
    teacher = models.build("resnet14", 5)
    if kind == "black box":
        teacher = black_box(lambda images: torch.softmax(images.mean((2, 3)), 1), classes=3)
    found = Distiller(DistillConfig(**settings), teacher=teacher).materials
    assert len(found.images.dataset.classes) == (3 if kind == "black box" else 5)


def test_weights_of_another_network_do_not_tell_the_classes(settings, weights):
    with pytest.raises(ModelError, match="does not tell how many classes"):
        _ = Distiller(DistillConfig(**{**settings, "teacher": "torchvision/vgg11"})).materials


@pytest.mark.parametrize(("name", "size"), [("torchvision/densenet121", 32), ("mobilenet_v2", 32), ("wrn_16_1", 32)])
def test_the_number_of_classes_is_read_from_weights(tmp_path, name, size):
    path = tmp_path / "weights.pth"
    own = {f"module.{key}": value for key, value in models.build(name, 11, size).state_dict().items()}
    torch.save({"state_dict": own}, path)
    assert models.classes_in(models.build(name, 4, size), path) == 11


REFUSED = [
    ({"method": "ce"}, "learns from labels alone"),
    ({"method": "kd", "logits_options": {"ce_weight": 0.5}}, "--logits-options.ce-weight 0"),
    ({"method": "at"}, "--logits-options.kl-weight 1"),
    *(({"method": name}, "have no labels; use --method kd") for name in ("dkd", "cckd", "kdiga")),
]


@pytest.mark.parametrize(("changed", "said"), REFUSED)
def test_what_needs_labels_is_refused(settings, changed, said):
    with pytest.raises(ConfigError, match=said):
        _ = Distiller(DistillConfig(**{**settings, **changed})).materials


def test_what_is_set_for_the_user_is_said_and_nothing_else_is(settings):
    with pytest.warns(UserWarning, match="ce-weight 0"):
        changed = without_labels(DistillConfig(**settings))
    assert changed.logits_options == {"ce_weight": 0.0}
    kept = DistillConfig(**settings, logits_options={"ce_weight": 0.0, "kl_weight": 2.0})
    assert without_labels(kept) is kept


def test_every_loss_that_reads_labels_is_known_to():
    """Whatever the head's losses give for other labels than the true ones, without their cross entropy."""
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 5), torch.randn(6, 5)
    one, other = torch.tensor([0, 1, 2, 3, 4, 0]), torch.tensor([3, 3, 1, 0, 0, 2])
    for name, entry in _REGISTRY["logits"].items():
        fields = {field.name for field in entry.config.__dataclass_fields__.values()}
        loss = objective("logits", name, {"ce_weight": 0.0} if "ce_weight" in fields else {})
        try:
            found = [loss(student, teacher, labels)[0] for labels in (one, other)]
            reads = not torch.equal(*found)
            without = loss(student, teacher, None)[0]
        except (ConfigError, AttributeError, IndexError, RuntimeError, TypeError, AssertionError):
            reads = True
        assert reads == (name in NEED_LABELS["logits"]), name
        if not reads:
            assert torch.equal(without, found[0]), name


@pytest.mark.parametrize("name", METHODS)
def test_every_method_goes_without_labels_or_is_refused(settings, name):
    options = {"teachers": ["resnet14:more.safetensors"]} if name == "multi-teacher" else {}
    config = DistillConfig(**{**settings, "method": name, "auxiliary_options": options})
    method = METHODS[name]
    losses = losses_of(config)
    needs = any(losses[place] in NEED_LABELS[place] for place in NEED_LABELS) or not method.needs_teacher
    if losses["synthesis"]:
        assert without_labels(config) is config  # images that are made have labels
    elif needs or getattr(objectives_of(config).logits.config, "kl_weight", 1) == 0:
        with pytest.raises(ConfigError, match="labels"):
            without_labels(config)
    else:
        assert not getattr(objectives_of(without_labels(config)).logits.config, "ce_weight", 0)


@pytest.mark.parametrize(
    "changed",
    [
        {"method": "mix-kd", "mix": "cutmix"},
        {"method": "crd", "logits_options": {"kl_weight": 1.0}},
        {"method": "logit-std"},
        {"method": "gkd"},
    ],
    ids=lambda changed: changed["method"],
)
def test_losses_of_all_places_train_without_labels(settings, changed, one_thread):
    short = {"epochs": 0.5, "evaluate_every": 0, "validation": 0}
    assert np.isfinite(distill(**{**settings, **short, **changed}, progress=False).accuracy)


def test_a_student_without_labels_is_evaluated_on_images_that_have_some(settings, write_labelled, tmp_path, one_thread):
    distill(**settings, method="kd", progress=False)
    student = tmp_path / "run/student.safetensors"
    with pytest.raises(ConfigError, match="have no labels, which accuracy is held against"):
        evaluate_file(student)
    assert evaluate_file(student, data=str(write_labelled)).images == CLASSES


@pytest.fixture
def write_labelled(tmp_path):
    for part in ("train", "test"):
        for label in range(CLASSES):
            path = tmp_path / "labelled" / part / f"c{label}" / "0.png"
            path.parent.mkdir(parents=True)
            Image.new("RGB", (16, 16), (30 * label, 1, 1)).save(path)
    return tmp_path / "labelled"


def test_the_command_says_what_it_measured(settings, capsys, one_thread):
    words = [w for name, value in settings.items() for w in (f"--{name.replace('_', '-')}", str(value))]
    assert cli.main(["distill", *words, "--method", "kd"]) == 0
    printed = capsys.readouterr().out
    assert "held against the teacher" in printed and "accuracy" not in printed
