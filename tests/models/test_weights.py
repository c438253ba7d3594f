import pytest
import safetensors.torch
import torch
from torch import nn

from stablekd_fast import models
from stablekd_fast.errors import ModelError


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


def test_python_objects_are_never_unpickled(tmp_path):
    torch.save(student(1), tmp_path / "model.pth")
    assert_refused(tmp_path / "model.pth", "never loaded.*state_dict")


@pytest.mark.parametrize(
    "content",
    [{}, [1, 2], {"epoch": 3, "weights": [1.0]}, {0: torch.zeros(1)}],
    ids=["empty", "list", "no tensors", "no names"],
)
def test_files_without_weights(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    assert_refused(tmp_path / "w.pth", "holds no weights|not tensors")
