"""Stored rows are used again only where all that they depend on is the same: each field is changed by itself."""

import dataclasses
import importlib.util
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from stablekd_fast.blocks import pair_blocks
from stablekd_fast.cache.fingerprint import image_fingerprint, prefix_digests, teacher_fingerprint
from stablekd_fast.data import open_dataset
from stablekd_fast.data.dataset import Augmentation
from stablekd_fast.execution.precision import Precision

CPU = torch.device("cpu")
BASE = Augmentation("resized_crop", flip=True, padding=2, size=8, jitter=0.2, mix="mixup", mix_alpha=0.5)
ALTERED = {
    "kind": "pad_crop", "flip": False, "padding": 3, "size": 9, "jitter": 0.3, "mix": "cutmix", "mix_alpha": 0.7,
    "scaled_decode": True, "scale": (0.2, 1.0), "ratio": (0.5, 2.0), "interpolation": "bicubic", "operations": 2,
    "magnitude": 10, "erasing": 0.25,
}  # fmt: skip


@pytest.fixture(scope="module")
def digits():
    return open_dataset("digits")


@pytest.fixture
def source(digits):
    return SimpleNamespace(
        split=digits.train, augmentation=BASE, view_seed=1, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0), batch_size=32,
        decoder=None,
    )  # fmt: skip


def text(facts) -> str:
    return json.dumps(facts, sort_keys=True)


def test_every_field_of_an_augmentation_changes_what_images_depend_on(source):
    assert ALTERED.keys() == {field.name for field in dataclasses.fields(Augmentation)}, "list the new field here"
    seen = {text(image_fingerprint(source))}
    for name, value in ALTERED.items():
        source.augmentation = dataclasses.replace(BASE, **{name: value})
        seen.add(text(image_fingerprint(source)))
    assert len(seen) == 1 + len(ALTERED)


def other_members(split):
    """The same images, of which fewer are trained on: a mixed image may have another partner."""
    return SimpleNamespace(identity=split.identity, sample_ids=split.sample_ids[:-1], decoded=split.decoded)


def test_seed_data_and_decoder_change_what_images_depend_on(source, digits):
    seen = [text(image_fingerprint(source))]
    for change in (
        {"view_seed": 2},
        {"split": digits.test},
        {"split": other_members(digits.train)},
    ):
        seen.append(text(image_fingerprint(SimpleNamespace(**{**vars(source), **change}))))
    decoded = SimpleNamespace(**{**vars(digits.train), "decoded": True, "crop_size": 8}, identity=digits.train.identity)
    decoded.sample_ids = digits.train.sample_ids
    for decoder in ({"decoder": "one"}, {"decoder": "other"}):
        own = SimpleNamespace(identity=lambda decoder=decoder: decoder)
        seen.append(text(image_fingerprint(SimpleNamespace(**{**vars(source), "split": decoded, "decoder": own}))))
    decoded.crop_size = 9
    seen.append(text(image_fingerprint(SimpleNamespace(**{**vars(source), "split": decoded, "decoder": own}))))
    assert len(set(seen)) == len(seen)


def network(width: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
    return nn.Sequential(first, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def paired(teacher: nn.Module | None = None, width: int = 8, **settings):
    made = pair_blocks(teacher or network().eval(), network(width), torch.randn(16, 3, 8, 8), cuts=["0"], **settings)
    made.precision = Precision("fp32")
    return made


def test_everything_that_a_row_depends_on_changes_its_fingerprint(source, monkeypatch):
    """At the cut, and behind it."""
    base = paired()

    def prints(pair=base, **changes):
        return list(map(text, teacher_fingerprint(pair, SimpleNamespace(**{**vars(source), **changes}), CPU)))

    known = prints()
    assert prints() == known and prints(paired()) == known, "the same, made anew"
    changed = {
        "mean": prints(mean=(0.1, 0.2, 0.4)),
        "std": prints(std=(1.0, 2.0, 4.0)),
        "batch size": prints(batch_size=16),
        "view": prints(view_seed=3),
    }
    half = paired()
    half.precision = Precision("bf16")
    changed["precision"] = prints(half)
    for name, alter in {
        "a weight": lambda net: net[0][0].weight.view(-1)[5].add_(1e-6),
        "a buffer": lambda net: net[0][1].running_var[3].mul_(1.01),
        "a setting of a module": lambda net: setattr(net[0][1], "eps", 1e-4),
        "an operation": lambda net: net[0].__setitem__(2, nn.ReLU6()),
    }.items():
        teacher = network().eval()
        with torch.no_grad():
            alter(teacher)
        changed[name] = prints(paired(teacher))
    with monkeypatch.context() as patched:
        patched.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
        changed["the processor"] = prints()
    with monkeypatch.context() as patched:
        patched.setattr(torch, "__version__", "9.9")
        changed["the version of torch"] = prints()
    for name, found in changed.items():
        assert all(a != b for a, b in zip(found, known)), name
    all_texts = [found[0] for found in changed.values()]
    assert len(set(all_texts)) == len(all_texts)


def test_a_bridge_is_part_of_the_fingerprint_of_its_cut_alone(source):
    plain, select, pca = (
        list(map(text, teacher_fingerprint(pair, source, CPU)))
        for pair in (paired(), paired(width=4), paired(width=4, bridge="pca"))
    )
    assert len({plain[0], select[0], pca[0]}) == 3
    assert plain[1] == select[1] == pca[1], "logits are not bridged"


LEAF = """
from torch import nn

class Part(nn.Module):
    def forward(self, x):
        if float(x.sum()) > 1e30:  # cannot be traced: it stays one module of the graph
            return x
        return x * FACTOR

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.part, self.head = nn.Conv2d(3, 4, 1), Part(), nn.Linear(4, 10)

    def forward(self, x):
        return self.head(self.part(self.conv(x)).mean((2, 3)))
"""


def test_the_source_of_a_module_inside_a_graph_counts(tmp_path, monkeypatch):
    found = []
    for factor in ("2.0", "3.0"):
        path = tmp_path / f"leaf{factor[0]}.py"
        path.write_text(LEAF.replace("FACTOR", factor))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, path.stem, module)
        spec.loader.exec_module(module)
        torch.manual_seed(0)
        net = module.Net().eval()
        made = pair_blocks(net, module.Net(), torch.randn(2, 3, 8, 8), cuts=["part"])
        assert any(node.op == "call_module" and node.target == "part" for node in made.teacher_blocks[0].graph.nodes)
        found.append(prefix_digests(made))
    assert found[0][0] != found[1][0] and found[0][1] != found[1][1]
