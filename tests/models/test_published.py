"""Published weights by name: from the caches and folders that the owning libraries fill, and without a network."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from stablekd_fast import models
from stablekd_fast.errors import ModelError
from stablekd_fast.models.published import asks_for_weights, without_weights

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
constants = pytest.importorskip("huggingface_hub").constants

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """Empty caches, and the hub's own word that there is no network."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    torch.hub.set_dir(str(tmp_path / "torch"))
    yield tmp_path
    torch.hub.set_dir(str(Path(torch.hub._get_torch_home()) / "hub"))


def timm_folder(folder, classes=5):
    torch.manual_seed(1)
    model = timm.create_model("test_resnet", num_classes=classes, pretrained=False).eval()
    timm.models.save_for_hf(
        model, str(folder), safe_serialization=True, model_config={"label_names": [f"n{k}" for k in range(5)]}
    )
    return model


def into_cache(cache, repository, folder):
    """Lay a folder out as the hub's library keeps a repository that it has fetched."""
    place = cache / f"models--{repository.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    (place / "snapshots").mkdir()
    folder.rename(place / "snapshots" / commit)


def same(one: nn.Module, other: nn.Module) -> bool:
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][key], states[1][key]) for key in states[0]
    )


def test_timm_s_weights_from_a_folder(tmp_path):
    own = timm_folder(tmp_path / "mine")
    found = models.published(f"hf:{tmp_path / 'mine'}")
    assert found is not None and found.classes == 5
    assert found.card == {
        "mean": list(own.pretrained_cfg["mean"]), "std": list(own.pretrained_cfg["std"]),
        "image_size": own.pretrained_cfg["input_size"][-1], "classes": [f"n{k}" for k in range(5)],
    }  # fmt: skip
    assert same(models.build(f"hf:{tmp_path / 'mine'}", 5), own)


def test_timm_s_weights_from_the_hub_s_cache(offline):
    own = timm_folder(offline / "mine")
    into_cache(offline / "hub", "somebody/mine", offline / "mine")
    assert same(models.build("hf:somebody/mine", 5), own)
    with pytest.raises(ModelError, match="hf:somebody/mine@v2 cannot be loaded"):
        models.published("hf:somebody/mine@v2")


def test_timm_s_own_names_take_what_the_cache_has(offline):
    architecture, tag = "test_resnet", timm.get_pretrained_cfg("test_resnet").tag
    torch.manual_seed(1)
    own = timm.create_model(architecture, pretrained=False)
    timm.models.save_for_hf(own, str(offline / "mine"), safe_serialization=True)
    into_cache(offline / "hub", timm.get_pretrained_cfg(architecture).hf_hub_id, offline / "mine")
    for name in (
        f"timm/{architecture}@pretrained",
        f"timm/{architecture}@{tag}",
        f"timm/{architecture}.{tag}@pretrained",
    ):
        assert same(models.build(name, 1000), own), name
    with pytest.warns(UserWarning, match="tells 1000 classes apart: that for 3 classes starts from random"):
        other = models.build(f"timm/{architecture}@pretrained", 3).state_dict()
    kept = [key for key, value in own.state_dict().items() if torch.equal(value, other[key])] if other else []
    assert set(own.state_dict()) - set(kept) <= {"fc.weight", "fc.bias"}


@pytest.mark.parametrize("named", [True, False])
def test_transformers_weights_from_a_folder(tmp_path, named):
    names = ["ant", "bee", "cat"] if named else [f"LABEL_{k}" for k in range(3)]
    torch.manual_seed(1)
    own = transformers.ViTForImageClassification(
        transformers.ViTConfig(
            **SMALL, id2label=dict(enumerate(names)), label2id={name: k for k, name in enumerate(names)}
        )
    ).eval()
    own.save_pretrained(tmp_path / "mine")
    transformers.ViTImageProcessor(
        size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]
    ).save_pretrained(tmp_path / "mine")
    found = models.published(f"hf:{tmp_path / 'mine'}")
    assert found is not None and found.classes == 3
    card = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "image_size": 32}
    assert found.card == ({**card, "classes": names} if named else card)
    model = models.build(f"hf:{tmp_path / 'mine'}", 3)
    assert same(model, own) and not model.training
    with pytest.warns(UserWarning, match="that for 4 classes starts from random"):
        assert models.build(f"hf:{tmp_path / 'mine'}", 4)(torch.zeros(1, 3, 32, 32)).logits.shape == (1, 4)


def test_a_network_of_transformers_without_a_classifier_has_no_classes(offline):
    transformers.ViTModel(transformers.ViTConfig(**SMALL)).save_pretrained(offline / "mine")
    into_cache(offline / "hub", "somebody/bare", offline / "mine")
    found = models.published("hf:somebody/bare")
    assert found is not None and found.classes == 0 and "mean" not in found.card
    assert type(found.build(0, None)) is transformers.ViTModel
    with pytest.warns(UserWarning, match="has no classifier: that for 2 classes starts from random"):
        assert found.build(2, None)(torch.zeros(1, 3, 32, 32)).logits.shape == (1, 2)


def test_torchvision_s_weights_from_its_cache(offline):
    member = torchvision.models.get_model_weights("squeezenet1_1").DEFAULT
    torch.manual_seed(1)
    own = torchvision.models.squeezenet1_1()
    file = offline / "torch" / "checkpoints" / member.url.rpartition("/")[2]
    file.parent.mkdir(parents=True)
    torch.save(own.state_dict(), file)
    for tag in ("DEFAULT", "pretrained", member.name):
        found = models.published(f"torchvision/squeezenet1_1@{tag}")
        assert found is not None and found.card["classes"] == member.meta["categories"]
        assert (found.card["mean"], found.card["image_size"]) == ([0.485, 0.456, 0.406], 224)
        assert same(models.build(f"torchvision/squeezenet1_1@{tag}", 1000), own)
    with pytest.warns(UserWarning, match="tells 1000 classes apart"):
        other = models.build("torchvision/squeezenet1_1@DEFAULT", 7).state_dict()
    assert all(torch.equal(other[key], value) for key, value in own.state_dict().items() if "classifier" not in key)
    assert other["classifier.1.weight"].shape[0] == 7
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelError, match=f"cannot be loaded.*Put {member.url} into {file.parent}"):
        models.build("torchvision/squeezenet1_1@DEFAULT", 1000)


def test_what_torchvision_does_to_images_of_inception_is_done(offline):
    member = torchvision.models.get_model_weights("googlenet").DEFAULT
    file = offline / "torch" / "checkpoints" / member.url.rpartition("/")[2]
    file.parent.mkdir(parents=True)
    torch.save(torchvision.models.googlenet(init_weights=False).state_dict(), file)
    with pytest.warns(UserWarning, match="auxiliary heads aux1, aux2"):
        ours = models.build("torchvision/googlenet@DEFAULT", 1000).eval()
    theirs = torchvision.models.googlenet(weights=member).eval()
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("hf:nobody/nothing", r"`hf download nobody/nothing --local-dir FOLDER`.*models--nobody--nothing"),
        ("timm/resnet18@pretrained", r"`hf download timm/resnet18.a1_in1k --local-dir FOLDER`"),
    ],
)
def test_without_a_network_one_sentence_says_what_to_put_where(offline, name, said):
    with pytest.raises(ModelError, match=said) as raised:
        models.build(name, 1000)
    assert str(raised.value).startswith(f"{name} cannot be loaded: ") and str(offline / "hub") in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_unreachable_proxy_is_such_a_sentence_too(offline, monkeypatch):
    for variable in ("http_proxy", "https_proxy", "HTTPS_PROXY", "HTTP_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    with pytest.raises(ModelError, match=r"Connection refused.*resnet34-b627a593.pth into .*checkpoints"):
        models.build("torchvision/resnet34@DEFAULT", 1000)


NAMES_WITHOUT_WEIGHTS = """
import socket, sys
def refuse(*arguments, **others):
    raise SystemExit("the network was asked for")
socket.getaddrinfo = socket.socket.connect = refuse
from stablekd_fast import models
for name in ("timm/resnet18", "timm/test_vit", "torchvision/resnet18", "resnet20"):
    models.build(name, 10, 160 if name == "timm/test_vit" else None)
    assert models.published(name) is None
assert models.published("timm/resnet18@pretrained").classes == 1000  # what they are is known without them
assert models.published("torchvision/resnet18@DEFAULT").classes == 1000
try:
    models.build("torchvision/resnet18@DEFAULT", 10)
except SystemExit as asked:
    print(asked)
"""


def test_nothing_is_fetched_that_was_not_asked_for(tmp_path):
    homes = {"HF_HOME": str(tmp_path / "hf"), "TORCH_HOME": str(tmp_path / "torch")}
    ended = subprocess.run(
        [sys.executable, "-c", NAMES_WITHOUT_WEIGHTS], env=os.environ | homes, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip().endswith("the network was asked for")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("resnet20@pretrained", "only torchvision/NAME@WEIGHTS"),
        ("torchvision/resnet18@nope", "it has DEFAULT, IMAGENET1K_V1"),
        ("torchvision/rest@DEFAULT", "no classification model 'rest'"),
        ("timm/resnet18@nope", "it has pretrained, a1_in1k"),
        ("timm/resnet18_@pretrained", "The nearest: timm/resnet18"),
        ("hf:resnet18", "neither a folder nor a repository"),
        ("hf:a/b/c", "neither a folder nor a repository"),
    ],
)
def test_names_that_are_none_are_refused(name, said):
    with pytest.raises(ModelError, match=said):
        models.published(name)


@pytest.mark.parametrize(
    ("content", "said"),
    [("{}", "neither an architecture"), ("[1]", "neither an architecture"), ("{", "cannot be loaded: ")],
)
def test_folders_of_nobody_are_refused(tmp_path, content, said):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=said):
        models.published(f"hf:{tmp_path}")


def test_weights_that_are_missing_in_a_folder_are_said(tmp_path):
    timm_folder(tmp_path / "mine")
    (tmp_path / "mine" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="Have the library that wrote this folder write it anew"):
        models.build(f"hf:{tmp_path / 'mine'}", 5)


def test_a_network_s_name_alone():
    assert without_weights("timm/resnet18@pretrained") == "timm/resnet18"
    assert without_weights("hf:a/b@v1") == "hf:a/b@v1"
    assert [asks_for_weights(name) for name in ("timm/resnet18", "timm/resnet18@a1_in1k", "hf:a/b")] == [0, 1, 1]
    model = models.build("torchvision/squeezenet1_1@DEFAULT", 4, weights=False)
    assert model.num_classes == 4


def test_trained_students_of_published_ones_need_no_weights_again(offline):
    assert models.build("timm/test_resnet@pretrained", 6, weights=False).num_classes == 6
