"""Makes the files of this folder: what a small run writes, with the version of this project that is installed.

    python make.py FOLDER

The folders are called after what was new in them: `0` is of 27 November 2026 (commit 7b4ca70), before files carried
digests and versions; `1` and `2` name the formats that followed.
"""

import json
import shutil
import sys
import warnings
from pathlib import Path

import torch
from torch import nn

from stablekd_fast.cache import CacheSettings
from stablekd_fast.config import DistillConfig
from stablekd_fast.run.distiller import Distiller


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)),
    )


def settings(folder, **more):
    return DistillConfig(
        data="digits", method="blocks", cuts=["0"], subset=32, validation=0, batch_size=16, views=1, bn_images=16,
        precision="fp32", device="cpu", out=str(folder / "out"), checkpoint_every=1,
        cache=CacheSettings(plan="all", directory=str(folder / "cache")), **{"epochs": 1.0, **more},
    )  # fmt: skip


def make(folder):
    shutil.rmtree(folder, ignore_errors=True)
    torch.set_num_threads(1)
    Distiller(settings(folder), teacher=network(0), student=network(1)).run(progress=False)
    student = {name: tensor.tolist() for name, tensor in network_of(folder).items()}
    (folder / "student.json").write_text(json.dumps(student))
    for path in folder.rglob("*"):
        if path.name in ("report.html", ".lock") or path.name.startswith("images-"):
            path.unlink()
        elif path.is_dir() and path.name.startswith("0"):
            shutil.rmtree(path)  # the rows of the logits are enough


def network_of(folder):
    import safetensors.torch

    return safetensors.torch.load_file(folder / "out" / "student.safetensors")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    make(Path(sys.argv[1]))
