"""Networks without their classifier, and their weights from files that have one and from files that have none."""

import dataclasses

import pytest
import torch
from torch import nn

from stablekd_fast import models
from stablekd_fast.errors import ModelError
from stablekd_fast.models.headless import named_network, without_classifier
from stablekd_fast.models.outputs import logits_of

NETWORKS = {
    "resnet20": (64, ["linear.weight", "linear.bias"]),
    "resnet8x4": (256, ["fc.weight", "fc.bias"]),
    "torchvision/resnet18": (512, ["fc.weight", "fc.bias"]),
    "vit_b_16_6l": (768, ["heads.head.weight", "heads.head.bias"]),
    "torchvision/squeezenet1_1": (512, ["classifier.1.weight", "classifier.1.bias"]),
    "torchvision/mobilenet_v3_small": (1024, ["classifier.3.weight", "classifier.3.bias"]),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_gives_what_its_classifier_read(name):
    width, gone = NETWORKS[name]
    torch.manual_seed(0)
    network = models.build(name, 7, 32).eval()
    images, read = torch.randn(2, 3, 32, 32), []
    last = network.get_submodule(gone[0].rpartition(".")[0])
    last.register_forward_pre_hook(lambda module, given: read.append(given[0]))
    network(images)
    assert without_classifier(network) == gone
    found = network(images)
    assert found.shape == (2, width)
    if read[0].dim() == 2:
        assert torch.equal(found, read[0])


def test_a_network_of_timm_takes_its_classifier_off_itself():
    pytest.importorskip("timm")
    network = named_network("timm/vit_tiny_patch16_224", 7, 32, "embedding")
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 192)


@pytest.mark.parametrize("classes", [None, 3, 1000])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_file_may_have_a_classifier_of_any_number_of_classes_or_none(tmp_path, classes, prefix):
    torch.manual_seed(1)
    network = models.build("resnet20", classes or 10)
    if classes is None:
        without_classifier(network)
    state = {f"{prefix}{name}".replace("linear.", "fc."): value for name, value in network.state_dict().items()}
    torch.save(state, tmp_path / "weights.pt")
    loaded = named_network("resnet20", 10, 32, "embedding", tmp_path / "weights.pt").state_dict()
    assert loaded.keys() == {name for name in network.state_dict() if not name.startswith("linear.")}
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in loaded.items())


def test_a_file_of_another_network_is_refused(tmp_path):
    torch.save(models.build("resnet14", 10).state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ModelError, match="does not fit PaddedResNet"):
        named_network("resnet20", 10, 32, "embedding", tmp_path / "weights.pt")


def test_what_has_no_classifier_to_take_off_is_refused():
    with pytest.raises(ModelError, match=r"Sequential ends in 1 \(BatchNorm2d\), which is no classifier"):
        without_classifier(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    with pytest.raises(ModelError, match="no module"):
        without_classifier(nn.ReLU())
    with pytest.raises(ModelError, match="scores of items"):
        named_network("mf/8", 20, 10, "embedding")


@dataclasses.dataclass
class Pooled:
    last_hidden_state: torch.Tensor
    pooler_output: torch.Tensor | None


def test_of_several_outputs_the_embedding_is_the_pooled_one():
    tokens, pooled = torch.randn(2, 5, 4), torch.randn(2, 4)
    assert logits_of(Pooled(tokens, pooled)) is pooled
    assert logits_of(Pooled(tokens, None)) is tokens
    assert logits_of({"x_norm_patchtokens": tokens, "x_norm_clstoken": pooled}) is pooled
    assert logits_of({"pooler_output": pooled, "logits": tokens}) is tokens, "a classifier's logits go first"
