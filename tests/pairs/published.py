"""The networks of RepDistiller and mdistiller, read from where they are: their standard pairs are cut, and files in the
form that they publish go into our models of the same name.

    python tests/pairs/published.py --repdistiller FOLDER --mdistiller FOLDER

The folders are checkouts of github.com/HobbitLong/RepDistiller and github.com/megvii-research/mdistiller. Weights are
random: the files themselves are not needed, only their names and form.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from stablekd_fast import models
from stablekd_fast.blocks import pair_blocks
from stablekd_fast.models.outputs import logits_of

CIFAR_PAIRS = [
    ("resnet56", "resnet20"), ("resnet110", "resnet20"), ("resnet110", "resnet32"), ("resnet32x4", "resnet8x4"),
    ("wrn_40_2", "wrn_16_2"), ("wrn_40_2", "wrn_40_1"), ("vgg13", "vgg8"), ("vgg13", "MobileNetV2"),
    ("ResNet50", "MobileNetV2"), ("ResNet50", "vgg8"), ("resnet32x4", "ShuffleV1"), ("resnet32x4", "ShuffleV2"),
    ("wrn_40_2", "ShuffleV1"),
]  # fmt: skip
IMAGENET_PAIRS = [("ResNet34", "ResNet18"), ("ResNet50", "MobileNetV1")]
OURS = {"ResNet50": "resnet50_cifar", "ResNet18": "resnet18_cifar"}
"""Under our names, where they are not theirs; `resnet56` and its like carry `_fc` with us."""
AGREES = 1e-5


def _load(folder: Path, package: str, part: str) -> dict[str, Callable[..., nn.Module]]:
    """The builders that a checkout lists."""
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    try:
        listed = vars(importlib.import_module(package if package == "models" else f"{package}.models"))[part]
    finally:
        sys.path.pop(0)
    return {name: entry[0] if isinstance(entry, tuple) else entry for name, entry in listed.items()}


def _built(builder: Callable[..., nn.Module], **options) -> nn.Module:
    with contextlib.redirect_stdout(io.StringIO()):
        model = builder(**options)
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.uniform_(*((0.5, 1.5) if "var" in name else (-0.1, 0.1)))
    return model


def _our_name(name: str) -> str:
    plain = name.startswith("resnet") and "x" not in name
    return f"{name}_fc" if plain else OURS.get(name, name)


def _check_pairs(where: str, builders: dict, pairs: list[tuple[str, str]], size: int, **options) -> bool:
    good = True
    for teacher, student in pairs:
        torch.manual_seed(0)
        networks = [_built(builders[name], **options) for name in (teacher, student)]
        try:
            paired = pair_blocks(networks[0].eval(), networks[1], torch.randn(4, 3, size, size))
            print(f"cut      {where:12} {teacher} -> {student}: {', '.join(cut.name for cut in paired.cuts)}")
        except Exception as error:
            good = False
            print(f"REFUSED  {where:12} {teacher} -> {student}: {error}")
    return good


def _check_file(where: str, name: str, theirs: nn.Module, ours: nn.Module, content: dict, size: int) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        torch.save(content, Path(folder) / "ckpt_epoch_240.pth")
        try:
            models.load_weights(ours, Path(folder) / "ckpt_epoch_240.pth")
        except Exception as error:
            print(f"REFUSED  {where:12} {name}: {error}")
            return False
    images = torch.randn(4, 3, size, size)
    with torch.no_grad():
        expected, found = logits_of(theirs.eval()(images)), ours.eval()(images)
    apart = float((expected - found).abs().max() / expected.abs().max())
    print(f"{'loads' if apart <= AGREES else 'DIFFERS':8} {where:12} {name} into {_our_name(name)}: {apart:.1e} apart")
    return apart <= AGREES


def main() -> None:
    """Check both, and end with status 1 if anything is refused or differs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--repdistiller", type=Path)
    parser.add_argument("--mdistiller", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    good = True
    settings = argparse.Namespace(model="x", learning_rate=0.05, lr_decay_epochs=[150, 180, 210])
    for where, folder, package, part in (
        ("RepDistiller", given.repdistiller, "models", "model_dict"),
        ("mdistiller", given.mdistiller, "mdistiller", "cifar_model_dict"),
    ):
        if folder is None:
            continue
        builders = _load(folder, package, part)
        good &= _check_pairs(where, builders, CIFAR_PAIRS, 32, num_classes=100)
        for name, builder in builders.items():
            torch.manual_seed(1)
            theirs = _built(builder, num_classes=100)
            extra = {"opt": settings, "best_acc": np.float64(70.1)} if part == "model_dict" else {"epoch": 240}
            content = {"model": theirs.state_dict(), **extra}
            good &= _check_file(where, name, theirs, models.build(_our_name(name), 100, 32), content, 32)
    if given.mdistiller is not None:
        builders = _load(given.mdistiller, "mdistiller", "imagenet_model_dict")
        good &= _check_pairs("mdistiller", builders, IMAGENET_PAIRS, 224)
        for name in ("ResNet18", "ResNet34", "ResNet50", "MobileNetV1"):
            torch.manual_seed(1)
            theirs = _built(builders[name])
            ours = models.build(name if name == "MobileNetV1" else f"torchvision/{name.lower()}", 1000)
            content = {"model": {f"module.student.{key}": value for key, value in theirs.state_dict().items()}}
            good &= _check_file("mdistiller", name, theirs, ours, content, 224)
    sys.exit(not good)


if __name__ == "__main__":
    main()
