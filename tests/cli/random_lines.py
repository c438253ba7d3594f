"""Random command lines and configs, mostly right with one or two things wrong, drawn by a seed."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import numpy as np
import torch

from stablekd_fast import models
from stablekd_fast.engine.checkpoint import save_tensors

NUMBERS = [
    "0", "-1", "1", "3", "0.5", "1e30", "-0.0", "nan", "inf", "-inf", "1e-300", "99999999999999999999", "0x10", "1_0",
    "٣",
]  # fmt: skip
WORDS = [
    "", " ", "None", "null", "true", "auto", "x", "[]", "{}", "[1,", "{a: 1", "[a, b]", "a,b", "ü", "\u202e", "\t",
    "-", "--", "@x", "%s", "[bold]", "[/]", "\\", "'", '"', "*", "~", "!!python/object:os.system x", "a" * 3000,
]  # fmt: skip
PLACES = [
    "missing", "file", "folder", "locked", "[odd] [/name", "a b", "no\nline", "nul\0byte", "pipe", "/dev/null",
    "/proc/self/mem", "/", ".", "..", "", "x" * 300, "binary", "r\udce9sum", "file/below", "~nobody/x",
]  # fmt: skip
TEXTS = [
    "", "a: [1, 2", "a:\n\t- 1", "- 1\n- 2\n", "epochs: one", "epochs: [1]", "nothing_known: 1",
    "epochs: 1\nepochs: 2", "&a [*a]", "a: &a [x,x]\nb: &b [*a,*a]\nc: [*b,*b]", "optimizer: 3", "optimizer: {lr: x}",
    "optimizer: {rate: 1}", "cache: []", "stages: [{groups: 1}]", "stages: [{groups: [[0]], share: -1}]",
    "data: !!python/name:os.system", "~", "3", "config: self.yaml", "cuts: [[a, b], c]", "feature_options: 1",
    "logits_options: {temperature: hot}", "method: kd\n---\nmethod: ce", "'", "\ufeffseed: 1",
]  # fmt: skip

BASE = {
    "distill": {"--data": "images.npz", "--method": "ce", "--student": "resnet8", "--epochs": "1",
        "--batch-size": "4", "--validation": "0", "--bn-images": "4", "--out": "out", "--precision": "fp32"},
    "distill teacher": {"--data": "images.npz", "--method": "stablekd", "--teacher": "resnet8",
        "--teacher-weights": "weights.safetensors", "--student": "resnet8", "--epochs": "3", "--batch-size": "4",
        "--validation": "4", "--bn-images": "4", "--out": "out", "--precision": "fp32", "--blocks": "2"},
    "diagnose": {"--data": "images.npz", "--teacher": "resnet8", "--teacher-weights": "weights.safetensors",
        "--student": "resnet8", "--batch-size": "4", "--steps": "2", "--seeds": "1", "--probes": "1",
        "--out": "out"},
    "evaluate": {"": "weights.safetensors", "--data": "images.npz", "--model": "resnet8"},
    "plan": {"--teacher": "resnet8", "--student": "resnet8", "--image-size": "8", "--classes": "3"},
    "cache info": {"": "folder"},
    "cache verify": {"": "folder"},
    "cache gc": {"": "folder", "--columns": "x"},
    "cache build": {"--data": "images.npz", "--teacher": "resnet8", "--teacher-weights": "weights.safetensors",
        "--student": "resnet8", "--batch-size": "4", "--cache.directory": "rows", "--out": "out"},
    "info": {},
    "demo": {"--out": "out", "--data": "digits"},
    "bench show": {"": "file"},
    "bench": {},
    "cache": {},
    "": {},
}  # fmt: skip

MORE = [
    "--subset", "--subset-seed", "--image-size", "--views", "--jitter", "--mix", "--mix-alpha", "--cuts", "--blocks",
    "--bridge", "--align", "--feature", "--logits", "--precision", "--capture", "--fuse-norms", "--ema",
    "--accumulate", "--parallel", "--timeout", "--device", "--source", "--workers", "--prefetch", "--on-bad-image",
    "--evaluate-every", "--checkpoint-every", "--log-every", "--resume", "--extend", "--optimizer", "--optimizer.lr",
    "--optimizer.name", "--optimizer.warmup", "--cache.plan", "--cache.directory", "--cache.disk-budget",
    "--cache.codecs", "--cache.logits", "--cache.host-budget", "--stages", "--feature-options", "--logits-options",
    "--flip", "--mean", "--std", "--crop.scale", "--crop.padding", "--augment.operations", "--augment.erasing",
    "--interpolation", "--evaluation.crop", "--evaluation.resize", "--teacher-mean", "--teacher-image-size",
    "--student-weights", "--seed", "--epochs", "--recipe", "--config", "--json", "--split", "--seeds", "--ranks",
    "--budget-disk", "--device-profile", "--help", "--unknown", "--data", "--out", "-x",
]  # fmt: skip


def prepare(folder: Path) -> None:
    """Make what the lines speak of."""
    generator = np.random.default_rng(0)
    images, labels = generator.integers(0, 256, (24, 8, 8, 3), dtype=np.uint8), np.arange(24) % 3
    np.savez(folder / "images.npz", x_train=images, y_train=labels, x_test=images[:6], y_test=labels[:6])
    torch.manual_seed(0)
    card = {"student": "resnet8", "classes": ["0", "1", "2"], "data": str(folder / "images.npz")}
    save_tensors(folder / "weights.safetensors", models.build("resnet8", 3, 8).state_dict(), card)
    (folder / "file").write_text("text\n")
    (folder / "binary").write_bytes(bytes(range(256)) * 4)
    (folder / "folder").mkdir()
    (folder / "[odd] [/name").mkdir(parents=True)
    (folder / "a b").mkdir()
    (folder / "locked").mkdir(mode=0o000)
    os.mkfifo(folder / "pipe")


def lines(seed: int, count: int, folder: Path):
    """Make `count` command lines; relative places lie in `folder`."""
    draw = random.Random(seed)
    for number in range(count):
        name = draw.choice(list(BASE))
        options = dict(BASE[name])
        words = [word for word in name.split() if word != "teacher"]
        for _ in range(draw.choice((0, 1, 1, 1, 2, 2, 3))):
            _spoil(draw, options)
        if name.startswith(("distill", "diagnose")) and draw.random() < 0.25:
            options["--config"] = _config(draw, folder, number)
        yield words + _typed(draw, options, folder)


def _spoil(draw: random.Random, options: dict[str, str]) -> None:
    how = draw.random()
    if how < 0.4 and options:
        options[draw.choice(list(options))] = _value(draw)
    elif how < 0.9:
        options[draw.choice(MORE)] = _value(draw)
    elif options:
        del options[draw.choice(list(options))]


def _value(draw: random.Random) -> str:
    return draw.choice(draw.choice((NUMBERS, NUMBERS, WORDS, PLACES)))


def _config(draw: random.Random, folder: Path, number: int) -> str:
    path = folder / f"{number}.yaml"
    text = draw.choice(TEXTS)
    path.write_bytes(text.encode() if draw.random() < 0.8 else text.encode("utf-16") + b"\xff\xfe\x00")
    if draw.random() < 0.2:
        name = draw.choice(("seed", "epochs", "data", "optimizer", "cache"))
        path.write_text(json.dumps({name: draw.choice((None, 1, "x", [], {}))}))
    return str(path)


def _typed(draw: random.Random, options: dict[str, str], folder: Path) -> list[str]:
    words = []
    for name, value in options.items():
        if value in PLACES or value in ("images.npz", "weights.safetensors", "out", "rows", "folder", "file"):
            value = value if value.startswith(("/", "~")) or value in ("", ".", "..") else str(folder / value)
        if not name:
            words.append(value)
        elif draw.random() < 0.5:
            words.append(f"{name}={value}")
        else:
            words += [name, value]
    if draw.random() < 0.05 and words:
        words.append(words[0])
    return words
