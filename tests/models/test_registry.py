import sys

import pytest
import torch
import torchvision

from stablekd_fast import models
from stablekd_fast.errors import ModelError
from stablekd_fast.models.cifar_vgg import VGG


def test_torchvision_names():
    model = models.build("resnet18", 5)
    assert isinstance(model, torchvision.models.ResNet)
    assert model.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 5)


def test_cifar_names_win_and_torchvision_is_reached_by_prefix():
    assert isinstance(models.build("vgg8", 5), VGG)
    assert isinstance(models.build("mobilenet_v2", 5).blocks, torch.nn.Sequential)
    assert isinstance(models.build("torchvision/mobilenet_v2", 5), torchvision.models.MobileNetV2)
    assert isinstance(models.build("torchvision/resnet18", 5), torchvision.models.ResNet)


def test_names_lists_each_model_once_under_the_name_that_builds_it():
    names = models.names()
    assert len(names) == len(set(names))
    assert {"resnet20", "vgg13", "torchvision/vgg13", "swin_t", "efficientnet_b3", "vit_b_16_6l"} <= set(names)
    assert "torchvision/resnet18" not in names
    theirs = {name.removeprefix("torchvision/") for name in names}
    assert theirs >= set(torchvision.models.list_models(module=torchvision.models))


def test_the_global_seed_decides_the_weights():
    def weight(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return models.build("resnet20", 10).layer2[0].conv1.weight

    assert torch.equal(weight(1), weight(1))
    assert not torch.equal(weight(1), weight(2))


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("resnet21", "resnet20"),
        ("wrn-40-2", "wrn_40_2"),
        ("ResNet18", "resnet18"),
        ("torchvision/vgg14", "vgg13"),
    ],
)
def test_unknown_name_suggests(name, nearest):
    with pytest.raises(ModelError, match=rf"no model '{name}'.*\b{nearest}\b"):
        models.build(name, 10)


def test_a_name_like_no_other_lists_our_own():
    with pytest.raises(ModelError, match="resnet20.*mobilenet_v2"):
        models.build("qqqq", 10)


@pytest.mark.parametrize("name", ["vit_b_32", "vit_b_16_6l"])
def test_vision_transformers_take_the_image_size(name):
    model = models.build(name, 5, image_size=64).eval()
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 5)
    with pytest.raises(ModelError, match="100x100"):
        models.build(name, 5, image_size=100)


def test_maxvit_refuses_a_size_that_its_windows_do_not_divide():
    with pytest.raises(ModelError, match="64x64.*not divisible"):
        models.build("maxvit_t", 5, image_size=64)


def test_models_with_auxiliary_classifiers_give_one_tensor_in_train_mode():
    assert models.build("googlenet", 5).train()(torch.randn(2, 3, 64, 64)).shape == (2, 5)


def test_bad_counts_are_refused():
    with pytest.raises(ModelError, match="0 classes"):
        models.build("resnet20", 0)
    with pytest.raises(ModelError, match="-1 pixels"):
        models.build("resnet20", 10, image_size=-1)


def test_without_timm_one_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModelError, match="pip install timm"):
        models.build("timm/resnet18", 10)


def test_with_timm():
    pytest.importorskip("timm")
    assert models.build("timm/resnet18", 5).eval()(torch.randn(2, 3, 32, 32)).shape == (2, 5)
    transformer = models.build("timm/vit_tiny_patch16_224", 5, image_size=64).eval()
    assert transformer(torch.randn(2, 3, 64, 64)).shape == (2, 5)
    with pytest.raises(ModelError, match="timm/resnet18"):
        models.build("timm/resnet19", 5)
