"""Proof that evaluation leaves training alone: a run with evaluations ends in the student of one without, to the bit.

    python tests/proof/evaluations.py PHOTOGRAPHS OUT

PHOTOGRAPHS holds JPEGs. A folder data set of four classes is made of them below OUT, a teacher is trained on it, and
for each source of images and each depth of reading ahead a student is distilled twice: with an evaluation every 7
steps, and with none but the last. Two more pairs of runs do so with small images, and with dropout in the student.
Exits with 1 where two students differ in a bit.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from stablekd_fast.cli import main
from stablekd_fast.config import DistillConfig
from stablekd_fast.run.distiller import Distiller

EVERY = 7
CLASSES, TRAINED, TESTED = 4, 32, 4
SIZE = 72
"""Pixels of the short side of the images that are made."""


def photographs(folder: Path, out: Path) -> Path:
    """Make the data set: classes are neighbours in the order of names, which is all that a proof of this kind needs."""
    names = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    wanted = CLASSES * (TRAINED + TESTED)
    if len(names) < wanted:
        sys.exit(f"{folder} holds {len(names)} JPEGs; {wanted} are needed.")
    for number, path in enumerate(names[:wanted]):
        label, place = divmod(number, TRAINED + TESTED)
        target = out / ("train" if place < TRAINED else "test") / f"class{label}" / f"{place}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as image:
            scale = SIZE / min(image.size)
            size = tuple(max(SIZE, round(side * scale)) for side in image.size)
            image.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(target, quality=92)
    return out


def student(words: list[object], out: Path, every: float) -> tuple[dict[str, torch.Tensor], int, int]:
    """Train; return the student, and of how many evaluations and steps the run's log tells."""
    words = ["distill", *words, "--out", out, "--evaluate-every", every, "--device", "cpu", "--precision", "fp32"]
    if main([str(word) for word in words]) != 0:
        sys.exit("A run failed.")
    return load_file(out / "student.safetensors"), *_told(out)


def _told(out: Path) -> tuple[int, int]:
    events = [json.loads(line) for line in (out / "events.jsonl").open()]
    evaluations = sum(event["kind"] == "evaluate" and event["split"] == "validation" for event in events)
    return evaluations, events[-1]["steps"]


def compare(name: str, runs: list[tuple[dict[str, torch.Tensor], int, int]]) -> bool:
    """Print a row of the table; return whether the students are the same."""
    (one, seen, steps), (other, unseen, _) = runs
    differing = [key for key in one if not torch.equal(one[key], other[key])]
    found = "the same bits" if not differing else f"{len(differing)} of {len(one)} tensors differ"
    print(f"| {name} | {steps} | {seen} and {unseen} | {found} |", flush=True)
    return not differing and seen > unseen


def with_dropout(out: Path, every: float) -> tuple[dict[str, torch.Tensor], int, int]:
    """Train a student that draws random numbers in every step."""
    torch.manual_seed(1)
    layers = [nn.Flatten(), nn.Linear(3 * 64, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Dropout(0.3), nn.Linear(48, 10)]
    config = DistillConfig(
        data="digits", method="ce", subset=480, validation=0.2, batch_size=32, epochs=4, bn_images=64, device="cpu",
        precision="fp32", evaluate_every=every, out=str(out),
    )  # fmt: skip
    Distiller(config, student=nn.Sequential(*layers)).run(progress=False)
    return load_file(out / "student.safetensors"), *_told(out)


def prove(folder: Path, out: Path) -> bool:
    """Make all runs below `out`, and print a table."""
    data = photographs(folder, out / "data")
    steps_per_epoch = round(0.75 * CLASSES * TRAINED) // 8
    common = ["--data", data, "--image-size", 64, "--validation", 0.25, "--batch-size", 8, "--bn-images", 24]
    student([*common, "--method", "ce", "--student", "resnet18", "--epochs", 1], out / "teacher", 0)
    pair = ["--teacher", "resnet18", "--teacher-weights", out / "teacher/student.safetensors", "--student", "resnet18"]
    print("| source | steps | evaluations | students |\n|---|---|---|---|", flush=True)
    sound = []
    for source in ("dali", "torchvision", "dali-stream"):
        for ahead in (1, 2, 4):
            words = [*common, *pair, "--epochs", 2, "--source", source, "--prefetch", ahead]
            runs = [student(words, out / f"{source}{ahead}-{e:g}", e) for e in (EVERY / steps_per_epoch, 0)]
            sound.append(compare(f"`--source {source} --prefetch {ahead}`", runs))
    small = ["--data", "digits", "--method", "ce", "--student", "resnet20", "--subset", 480, "--validation", 0.2]
    small += ["--batch-size", 32, "--epochs", 2, "--bn-images", 64, "--source", "resident"]
    sound.append(compare("`--source resident`", [student(small, out / f"resident-{e:g}", e) for e in (EVERY / 12, 0)]))
    runs = [with_dropout(out / f"dropout-{e:g}", e) for e in (EVERY / 12, 0)]
    sound.append(compare("a student with dropout", runs))
    return all(sound)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("photographs", type=Path, help="a folder of JPEGs")
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    sys.exit(0 if prove(given.photographs, given.out) else 1)
