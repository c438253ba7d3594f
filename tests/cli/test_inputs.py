"""Each network its own input: what a teacher's images are, what is said of it, and that `evaluate` repeats a run."""

import json
import warnings
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image
from torchvision.transforms.functional import resize

from stablekd_fast import distill, evaluate_file, models
from stablekd_fast.blocks import pair_blocks
from stablekd_fast.data import EvalSource, open_dataset
from stablekd_fast.errors import ConfigError, ModelError
from stablekd_fast.models.inputs import Adapted, ImageInput, input_of
from stablekd_fast.models.weights import card_of

SMALL = {
    "student": "resnet20_half",
    "subset": 128,
    "batch_size": 32,
    "validation": 64,
    "bn_images": 64,
    "progress": False,
}


def run(out, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return distill(**{**SMALL, "data": "digits", "out": str(out), "precision": "fp32", "epochs": 2.0, **settings})


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A teacher of images that were scaled to 0..1 and nothing else, and its data set."""
    out = tmp_path_factory.mktemp("teacher")
    dataset = open_dataset("digits")
    dataset.mean, dataset.std = (0.0,) * 3, (0.25,) * 3
    result = run(out / "run", method="ce", dataset=dataset, subset=None, epochs=3.0)
    assert result.accuracy > 0.6
    return out / "run" / "student.safetensors", result


def test_a_card_travels_with_the_weights(teacher):
    file, result = teacher
    card = card_of(file)
    assert (card["mean"], card["std"]) == ([0.0] * 3, [0.25] * 3)
    assert card["accuracy"] == result.accuracy and card["classes"] == [str(digit) for digit in range(10)]
    assert evaluate_file(file).accuracy == result.accuracy


def events(out, kind):
    return [event for event in map(json.loads, (Path(out) / "events.jsonl").open()) if event["kind"] == kind]


@pytest.mark.parametrize("method", ["stablekd", "kd"])
def test_a_teacher_gets_the_images_that_it_knows(teacher, tmp_path, method):
    """The student's images are the data set's, the teacher's those of its card."""
    file, result = teacher
    settings = {**SMALL, "data": "digits", "method": method, "epochs": 5.0, "teacher": "resnet20_half"}
    with pytest.warns(UserWarning, match=r"teacher's images are made by mean \[0.0, 0.0, 0.0\].*digits"):
        distill(**settings, teacher_weights=str(file), out=str(tmp_path / "run"))
    (seen,) = events(tmp_path / "run", "teacher")
    assert seen["split"] == "held-out" and seen["images"] == 64
    assert seen["accuracy"] > result.accuracy - 0.15
    assert card_of(tmp_path / "run" / "student.safetensors")["mean"] == [0.3053] * 3


def test_settings_win_and_a_teacher_that_knows_nothing_is_called_that(teacher, tmp_path):
    file, _ = teacher
    settings = {**SMALL, "data": "digits", "method": "kd", "teacher": "resnet20_half", "teacher_weights": str(file)}
    with pytest.warns(UserWarning, match="its file says|guessing would give"):
        distill(**settings, epochs=0.5, teacher_mean=[30.0] * 3, teacher_std=[0.01] * 3, out=str(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"teacher_mean=\[0.5\].*three numbers"):
        distill(**settings, teacher_mean=[0.5], out=str(tmp_path / "other"))


def test_classes_in_another_order_are_noticed(teacher, tmp_path):
    file, _ = teacher
    dataset = open_dataset("digits")
    dataset.classes = dataset.classes[::-1]
    with pytest.raises(ModelError, match="another order: its class 0 is '0', the data set's '9'"):
        run(tmp_path / "run", dataset=dataset, method="kd", teacher="resnet20_half", teacher_weights=str(file))
    dataset.classes = [f"digit {digit}" for digit in range(10)]
    with pytest.warns(UserWarning, match=r"other classes \(0, 1, 2, ...\) than digits does"):
        settings = {**SMALL, "data": "digits", "method": "kd", "teacher": "resnet20_half", "epochs": 0.5}
        distill(**settings, dataset=dataset, teacher_weights=str(file), out=str(tmp_path / "run"))


def test_a_timm_teacher_gives_the_logits_that_timm_s_own_transforms_give(tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=32).eval()
    assert model.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "test"):
        for label in range(5):
            folder = tmp_path / split / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(4):
                pixels = torch.randint(0, 256, (32, 32, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    dataset = open_dataset(tmp_path)
    batch = next(iter(EvalSource(dataset.test, dataset.mean, dataset.std, batch_size=20).batches()))
    theirs = timm.data.create_transform(input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0)
    files = sorted((tmp_path / "test").glob("*/*.png"))
    expected = model(torch.stack([theirs(Image.open(file)) for file in files]))
    own = Adapted(ImageInput(dataset.mean, dataset.std, "data"), ImageInput((0.5,) * 3, (0.5,) * 3, "timm"))
    paired = pair_blocks(model, models.build("resnet20_half", 5), batch.pixels, teacher_input=own)
    found = paired.teacher_outputs(batch.pixels)[len(paired) - 1]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [48, 16])
def test_a_teacher_of_another_size_sees_the_same_images_at_its_own(tmp_path, size):
    """By its card, by the setting, and where a transformer given in Python takes one size only."""
    file = tmp_path / "teacher" / "student.safetensors"
    run(tmp_path / "teacher", method="ce", image_size=size, student="resnet20_half")
    settings = {**SMALL, "data": "digits", "method": "stablekd", "epochs": 5.0, "teacher": "resnet20_half"}
    with pytest.warns(UserWarning, match=f"teacher's images are made by .* and {size} pixels .* 12 pixels"):
        distill(**settings, teacher_weights=str(file), image_size=12, out=str(tmp_path / "card"))
    with pytest.warns(UserWarning, match="and 20 pixels"):
        distill(**settings, teacher_weights=str(file), teacher_image_size=20, image_size=12, out=str(tmp_path / "set"))
    with pytest.raises(ConfigError, match="teacher_image_size=0"):
        distill(**settings, teacher_weights=str(file), teacher_image_size=0, out=str(tmp_path / "none"))


def test_images_are_scaled_as_torchvision_scales_them_before_or_after_normalisation():
    images = torch.rand(2, 3, 40, 40)
    given, wanted = ImageInput((0.2,) * 3, (0.5,) * 3, "a"), ImageInput((0.5,) * 3, (0.1,) * 3, "b", 24)
    expected = (resize(images, [24, 24], antialias=True) - 0.5) / 0.1
    torch.testing.assert_close(Adapted(given, wanted)((images - 0.2) / 0.5), expected, atol=1e-5, rtol=1e-5)


def test_who_says_how_a_networks_images_are_made(tmp_path):
    timm = pytest.importorskip("timm")
    published = torchvision.models.ResNet34_Weights.IMAGENET1K_V1.url.rpartition("/")[2]
    resnet = torchvision.models.resnet34()
    assert input_of(resnet, {}, "mine.pth") is None
    said = input_of(resnet, {}, tmp_path / published)
    assert said == ImageInput((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), said.source, None)
    assert "ResNet34_Weights" in said.source
    assert input_of(resnet, {"classes": ["a"]}, tmp_path / published) is None
    vit = timm.create_model("vit_tiny_patch16_224", img_size=64)
    assert input_of(vit, {}, None) == ImageInput((0.5,) * 3, (0.5,) * 3, "its pretrained_cfg", 64)
    assert input_of(timm.create_model("resnet18"), {}, None).size is None
    card = {"mean": [0.1] * 3, "std": [0.2] * 3, "image_size": 40}
    assert input_of(resnet, card, "w") == ImageInput((0.1,) * 3, (0.2,) * 3, "w", 40)
    assert input_of(vit, card, "w").size == 64


def test_a_hugging_face_model_is_asked_by_its_processor(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path)
    model = transformers.ResNetForImageClassification.from_pretrained(tmp_path)
    assert input_of(model, {}, None) is None
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps(
            {"image_processor_type": "ConvNextImageProcessor", "image_mean": [0.3] * 3, "image_std": [0.7, 0.8, 0.9]}
        )
    )
    found = input_of(model, {}, None)
    assert (found.mean, found.std, found.size) == ((0.3,) * 3, (0.7, 0.8, 0.9), None)


VARIED = [
    {"method": "ce"}, {"method": "kd"}, {"method": "blocks"}, {"method": "kd+features"}, {"image_size": 16},
    {"image_size": 12, "method": "ce"}, {"views": 2}, {"jitter": 0.4}, {"mix": "cutmix"}, {"mix": "mixup"},
    {"ema": 0.9}, {"bn_images": 0}, {"accumulate": 2}, {"recipe": "progressive"}, {"validation": 0.0},
    {"subset_seed": 3, "seed": 5}, {"precision": "bf16"}, {"copy_classifier": False}, {"align": "ends"},
    {"capture": "emulate", "fuse_norms": "off"},
]  # fmt: skip


@pytest.mark.parametrize(
    "settings", [pytest.param(one, marks=() if k < 6 else pytest.mark.slow) for k, one in enumerate(VARIED)]
)
def test_evaluate_repeats_what_results_say(tmp_path, settings):
    """Runs are set differently, on a data set with another normalisation and size than by name."""
    dataset = open_dataset("digits", image_size=settings.get("image_size"))
    dataset.mean, dataset.std = (0.25, 0.3, 0.35), (0.5, 0.45, 0.4)
    weights = tmp_path / "teacher.pt"
    torch.manual_seed(1)
    torch.save(models.build("resnet20_half", 10).state_dict(), weights)
    epochs = 6.0 if "recipe" in settings else 4.0
    own = {"dataset": dataset, "teacher": "resnet20_half", "teacher_weights": str(weights), "epochs": epochs}
    run(tmp_path / "run", **{**own, **settings})
    (said,) = json.loads((tmp_path / "run" / "results.json").read_text())["runs"]
    (logged,) = [event for event in events(tmp_path / "run", "evaluate") if event["split"] == "test"]
    for file in ("student.safetensors", "checkpoint.safetensors"):
        found = evaluate_file(tmp_path / "run" / file)
        assert (found.accuracy, found.top5) == (said["accuracy"], said["top5"]), file
        assert found.loss == pytest.approx(logged["loss"], rel=1e-6), file
