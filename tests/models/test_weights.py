import argparse
import re
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn

from stablekd_fast import models
from stablekd_fast.errors import ModelError
from stablekd_fast.models.weights import restore_state


def student(seed: int, classes: int = 10) -> nn.Module:
    """resnet20_half with batch norm statistics of its own."""
    torch.manual_seed(seed)
    model = models.build("resnet20_half", classes)
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 2)
    return model


def copied(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def assert_refused(path, pattern: str, model: nn.Module | None = None) -> None:
    """load_weights raises a ModelError that matches, and leaves the model as it was."""
    model = model or student(9)
    before = copied(model)
    with pytest.raises(ModelError, match=pattern) as caught:
        models.load_weights(model, path)
    assert str(path) in str(caught.value)
    assert_same(model, before)


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "best_acc": 0.5},
        lambda state: {"module." + name: value for name, value in state.items()},
        lambda state: {"state_dict": {"module." + name: value for name, value in state.items()}},
    ],
    ids=["plain", "state_dict", "model", "module.", "nested module."],
)
def test_torch_files_round_trip(tmp_path, wrapped):
    saved, loaded = student(1), student(2)
    torch.save(wrapped(saved.state_dict()), tmp_path / "w.pth")
    assert models.load_weights(loaded, tmp_path / "w.pth") is None
    assert_same(loaded, saved.state_dict())


def test_safetensors_round_trip_by_text_path(tmp_path):
    saved, loaded = student(1), student(2)
    safetensors.torch.save_file(saved.state_dict(), tmp_path / "w.safetensors")
    models.load_weights(loaded, str(tmp_path / "w.safetensors"))
    assert_same(loaded, saved.state_dict())


def test_loading_keeps_the_models_parameters_and_dtype(tmp_path):
    saved, loaded = student(1), student(2)
    halves = {name: value.half() if value.is_floating_point() else value for name, value in copied(saved).items()}
    safetensors.torch.save_file(halves, tmp_path / "w.safetensors")
    parameters = list(loaded.parameters())
    models.load_weights(loaded, tmp_path / "w.safetensors")
    assert all(new is old for new, old in zip(loaded.parameters(), parameters, strict=True))
    assert loaded.conv1.weight.dtype == torch.float32
    assert torch.equal(loaded.conv1.weight, saved.conv1.weight.half().float())


def test_batch_counters_may_be_missing(tmp_path):
    saved, loaded = student(1), student(2)
    state = {name: value for name, value in copied(saved).items() if not name.endswith("num_batches_tracked")}
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    models.load_weights(loaded, tmp_path / "w.safetensors")
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in state.items())


def test_missing_and_unexpected_names_are_told(tmp_path):
    state = copied(student(1))
    del state["bn1.running_mean"], state["layer1.0.conv1.weight"]
    state["head.bias"] = torch.zeros(3)
    torch.save(state, tmp_path / "w.pth")
    assert_refused(tmp_path / "w.pth", "lacks bn1.running_mean, layer1.0.conv1.weight; the model has no head.bias")


def test_long_lists_are_cut_short(tmp_path):
    torch.save({"conv1.weight": student(1).conv1.weight.detach()}, tmp_path / "w.pth")
    assert_refused(tmp_path / "w.pth", r"lacks bn1.weight, bn1.bias, bn1.running_mean, bn1.running_var and \d+ more")


def test_shape_differences_are_told(tmp_path):
    torch.manual_seed(0)
    torch.save(models.build("resnet20", 10).state_dict(), tmp_path / "w.pth")
    pattern = r"conv1.weight \(\[16, 3, 3, 3\] in the file, \[8, 3, 3, 3\] in the model\)"
    assert_refused(tmp_path / "w.pth", pattern)


def test_another_class_count_is_said_plainly(tmp_path):
    torch.save(student(1, classes=100).state_dict(), tmp_path / "w.pth")
    assert_refused(tmp_path / "w.pth", r"the file's classifier has 100 classes, this data set has 10\.$")


def test_another_class_count_does_not_hide_other_differences(tmp_path):
    state = copied(student(1, classes=100))
    state["bn1.bias"] = torch.zeros(9)
    torch.save(state, tmp_path / "w.pth")
    assert_refused(tmp_path / "w.pth", r"has 100 classes, this data set has 10; tensors differ: bn1.bias \(\[9\]")


def test_integers_do_not_become_weights(tmp_path):
    state = copied(student(1))
    state["conv1.weight"] = state["conv1.weight"].to(torch.int8)
    torch.save(state, tmp_path / "w.pth")
    assert_refused(tmp_path / "w.pth", r"conv1.weight \(int8 \[8, 3, 3, 3\]")


def test_missing_file_and_directory(tmp_path):
    assert_refused(tmp_path / "nowhere.safetensors", "does not exist")
    assert_refused(tmp_path, "is a directory")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("keep", [0, 5, 100, 20_000])
def test_truncated_files(tmp_path, suffix, keep):
    whole, path = tmp_path / f"whole{suffix}", tmp_path / f"cut{suffix}"
    save = safetensors.torch.save_file if suffix == ".safetensors" else torch.save
    save(student(1).state_dict(), whole)
    path.write_bytes(whole.read_bytes()[:keep])
    assert_refused(path, "cannot be read|is damaged")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_of_something_else(tmp_path, suffix):
    path = tmp_path / f"text{suffix}"
    path.write_text("these are not weights\n" * 50)
    assert_refused(path, "cannot be read|is damaged")


class Hostile:
    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return Path.touch, (Path(self.trace),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_python_objects_are_never_made(tmp_path, zipped):
    """What stands beside the weights is not even looked at; what stands in their place is named."""
    saved, loaded, trace = student(1), student(2), tmp_path / "trace"
    beside = {"opt": Hostile(trace), "args": argparse.Namespace(lr=0.1), "best": np.float64(0.7), "at": np.arange(3)}
    torch.save({"model": saved.state_dict(), **beside}, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    models.load_weights(loaded, tmp_path / "w.pth")
    assert_same(loaded, saved.state_dict())
    torch.save(Hostile(trace), tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    assert_refused(tmp_path / "w.pth", "holds no weights.*not made")
    assert not trace.exists()


def test_a_whole_module_gives_its_weights(tmp_path):
    saved, loaded = student(1), student(2)
    torch.save(nn.DataParallel(saved), tmp_path / "model.pth")
    models.load_weights(loaded, tmp_path / "model.pth")
    assert_same(loaded, saved.state_dict())


def held_by_itself():
    content = {}
    content["state_dict"] = content
    return content


def held_twice_forty_times():
    content = {}
    for _ in range(40):
        content = {"state_dict": content, "model": content}
    return content


def module_in_itself():
    module = torch.nn.Sequential()
    module._modules["own"] = module
    return module


def modules_held_twice():
    module = torch.nn.Sequential()
    for _ in range(40):
        module = torch.nn.Sequential(module, module)
    return module


def module_of_another_kind():
    module = torch.nn.Sequential()
    module.__dict__["_modules"] = [1]
    return module


@pytest.mark.parametrize(
    "make", [held_by_itself, held_twice_forty_times, module_in_itself, modules_held_twice, module_of_another_kind]
)
def test_what_holds_itself_is_refused_at_once(tmp_path, make):
    path = tmp_path / "weights.pt"
    torch.save(make(), path)
    with pytest.raises(ModelError, match="weights.pt") as caught:
        models.load_weights(torch.nn.Linear(2, 2), path)
    assert "state_dict" in str(caught.value) and "\n" not in str(caught.value)


def test_a_tensor_that_reaches_beyond_its_storage_is_refused(tmp_path):
    class Forged:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (storage, 0, (1000, 1000), (1000, 1), False, OrderedDict())

    storage = torch.zeros(4).storage()
    torch.save({"conv1.weight": Forged()}, tmp_path / "w.pth")
    assert_refused(tmp_path / "w.pth", r"shape \[1000, 1000\] that reaches beyond its storage")


def test_a_script_is_refused_by_name(tmp_path):
    torch.jit.save(torch.jit.trace(student(1).eval(), torch.randn(1, 3, 32, 32)), tmp_path / "w.pt")
    assert_refused(tmp_path / "w.pt", "TorchScript archive, a program")


def prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


AS_TRAINED = {
    "timm": lambda state: {"epoch": 3, "arch": "x", "state_dict": state, "optimizer": {"state": {}}, "version": 2},
    "timm's average": lambda state: {"state_dict_ema": state},
    "torchvision's references": lambda state: {"model": state, "args": argparse.Namespace(), "scaler": {"scale": 1.0}},
    "torchvision's average": lambda state: {"model_ema": prefixed(state, "module.") | {"n_averaged": torch.tensor(3)}},
    "kuangliu": lambda state: {"net": prefixed(state, "module."), "acc": 95.3},
    "Lightning": lambda state: {
        "state_dict": prefixed(state, "model.")
        | {"criterion.weight": torch.ones(10), "embedding.weight": torch.ones(2)},
        "pytorch-lightning_version": "2.5",
        "hyper_parameters": {"lr": 0.1},
    },
    "compiled": lambda state: prefixed(state, "_orig_mod."),
    "compiled and parallel": lambda state: {"state_dict": prefixed(state, "module._orig_mod.")},
    "mdistiller": lambda state: {"model": prefixed(state, "module.student."), "epoch": 240, "best_acc": 70.0},
    "a counter of operations": lambda state: (
        state | {"total_ops": torch.zeros(1), "layer1.total_params": torch.zeros(1)}
    ),
}


@pytest.mark.parametrize("form", AS_TRAINED)
def test_files_as_training_scripts_leave_them(tmp_path, form):
    saved, loaded = student(1), student(2)
    torch.save(AS_TRAINED[form](copied(saved)), tmp_path / "w.pth")
    models.load_weights(loaded, tmp_path / "w.pth")
    assert_same(loaded, saved.state_dict())


def test_one_of_several_networks_must_be_meant(tmp_path):
    both = prefixed(copied(student(1)), "teacher.") | prefixed(copied(student(2)), "student.")
    torch.save({"state_dict": both}, tmp_path / "w.pth")
    assert_refused(
        tmp_path / "w.pth", "several networks.*'student.', 'teacher.'|several networks.*'teacher.', 'student.'"
    )
    loaded = student(3)
    torch.save({"state_dict": both | prefixed(copied(student(2, 7)), "teacher.")}, tmp_path / "w.pth")
    models.load_weights(loaded, tmp_path / "w.pth")  # the teacher has other classes
    assert_same(loaded, student(2).state_dict())


@pytest.mark.parametrize(
    ("ours", "pattern", "other"),
    [
        ("resnet8_fc", r"^fc\.", "linear."),
        ("resnet8", r"^linear\.", "fc."),
        ("resnet8_fc", r"\.downsample\.", ".shortcut."),
        ("torchvision/densenet121", r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2"),
    ],
    ids=["linear", "fc", "shortcut", "torchvision's first densenets"],
)
def test_other_names_of_the_same_layers(tmp_path, ours, pattern, other):
    torch.manual_seed(1)
    saved, loaded = models.build(ours, 10), models.build(ours, 10)
    torch.save({re.sub(pattern, other, name): value for name, value in saved.state_dict().items()}, tmp_path / "w.pth")
    assert re.search(pattern, " ".join(torch.load(tmp_path / "w.pth")).replace(" ", "\n"), re.M) is None
    models.load_weights(loaded, tmp_path / "w.pth")
    assert_same(loaded, saved.state_dict())


def test_auxiliary_heads_that_the_model_lacks_are_left_out_and_said(tmp_path):
    torch.manual_seed(1)
    theirs = torchvision.models.googlenet(weights=None, num_classes=10, aux_logits=True, init_weights=False)
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    loaded = models.build("googlenet", 10)
    with pytest.warns(UserWarning, match="auxiliary heads aux1, aux2 are left out"):
        models.load_weights(loaded, tmp_path / "w.pth")
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(loaded.eval()(images), theirs.eval()(images))


def test_timm_converts_what_a_model_s_authors_published(tmp_path):
    """DINOv2's own files keep `w12` and `w3`, ConvNeXt's `downsample_layers`."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(1)
    saved, loaded = timm.create_model("convnext_atto", num_classes=10), models.build("timm/convnext_atto", 10)
    authors = {}
    for name, value in saved.state_dict().items():
        name = re.sub(r"^stem\.(\d)", r"downsample_layers.0.\1", name)
        name = re.sub(r"^stages\.(\d)\.downsample\.(\d)", r"downsample_layers.\1.\2", name)
        name = re.sub(r"^stages\.(\d)\.blocks\.(\d)", r"stages.\1.\2", name)
        name = name.replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv").replace("head.fc.", "head.")
        authors[re.sub(r"^head\.norm\.", "norm.", name)] = value
    torch.save({"model": authors}, tmp_path / "w.pth")
    models.load_weights(loaded, tmp_path / "w.pth")
    assert_same(loaded, saved.state_dict())


def test_whose_weights_they_are_is_said(tmp_path):
    torch.save(models.build("resnet14_fc", 10).state_dict(), tmp_path / "w.pth")
    assert_refused(tmp_path / "w.pth", r"By their names and shapes these are weights of resnet14_fc\.")
    state = copied(student(1))
    state["linear.wieght"] = state.pop("linear.weight")
    torch.save(state, tmp_path / "w.pth")
    assert_refused(tmp_path / "w.pth", r"lacks linear.weight \(it has linear.wieght\)")


@pytest.mark.parametrize(
    "content",
    [{}, [1, 2], {"epoch": 3, "weights": [1.0]}, {0: torch.zeros(1)}],
    ids=["empty", "list", "no tensors", "no names"],
)
def test_files_without_weights(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    assert_refused(tmp_path / "w.pth", "holds no weights|not tensors")


@pytest.mark.parametrize("partial", [False, True])
def test_a_state_is_put_back_into_modules_that_ask_for_their_version(partial):
    """torchvision's MNASNet refuses a dict of tensors, which knows no version."""
    model, other = (torchvision.models.mnasnet0_5(num_classes=3) for _ in range(2))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="version"):
        other.load_state_dict(state)
    if partial:
        state = {name: value for name, value in state.items() if name.startswith("classifier")}
    else:
        with pytest.raises(RuntimeError, match="Missing"):
            restore_state(other, {"classifier.1.bias": state["classifier.1.bias"]})
    restore_state(other, state, partial=partial)
    assert all(torch.equal(other.state_dict()[name], value) for name, value in state.items())
