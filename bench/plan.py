"""`stablekd bench plan`: whole runs as the planner arranges them under several budgets, against what it predicted."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from stablekd_fast import models
from stablekd_fast.bench.core import pinned
from stablekd_fast.cache.plan import decisions, predict
from stablekd_fast.cache.settings import CacheSettings
from stablekd_fast.config import DistillConfig
from stablekd_fast.data import open_dataset
from stablekd_fast.distiller import Distiller

TEACHER, STUDENT = "resnet56", "resnet20"
IMAGES, BATCH, EPOCHS, VIEWS = 2560, 128, 4, 1
BUDGETS = ("0", "60MB", "100MB", "150MB", "400MB")
"""None, and what holds one, the other, two, and all three of the teacher's activations."""


def run_plan(
    folder: Path, data: str, show: Callable[[dict], None], rounds: int = 1, budgets=BUDGETS, images: int = IMAGES
) -> tuple[list[dict], dict]:
    """One row per run, the budgets in turn for each round: what was kept, predicted and measured seconds, and the
    measured ones over those of the live teacher's run of the same round."""
    dataset, scratch, rows = open_dataset(data), folder / f".bench-{os.getpid()}", []
    try:
        with pinned() as pins:
            for number in range(rounds):
                for budget in budgets:
                    rows.append({"round": number, **_one(dataset, scratch / str(number), budget, images)})
                    relay = rows[number * len(budgets)]["measured_seconds"]
                    rows[-1]["against_relay"] = rows[-1]["measured_seconds"] / relay
                    show(rows[-1])
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return rows, {"images": images, "batch": BATCH, "epochs": EPOCHS, "views": VIEWS, **pins}


def _one(dataset, scratch: Path, budget: str, images: int) -> dict:
    torch.manual_seed(0)
    classes, size = len(dataset.classes), dataset.train.images.shape[1]
    config = DistillConfig(
        data=dataset.name,
        subset=images,
        validation=0,
        evaluate_every=0,
        epochs=EPOCHS,
        views=VIEWS,
        batch_size=BATCH,
        bn_images=BATCH,
        precision="fp32",
        log_every=1000,
        out=str(scratch / f"run-{budget}"),
        cache=CacheSettings(directory=str(scratch / f"rows-{budget}"), disk_budget=budget),
    )
    networks = {"teacher": models.build(TEACHER, classes, size), "student": models.build(STUDENT, classes, size)}
    distiller = Distiller(config, dataset=dataset, **networks)
    result = distiller.run(progress=False)
    predicted = predict(distiller.costs, distiller.plan).seconds
    kept = [row["output"] for row in decisions(distiller.costs, distiller.plan) if row["decision"].startswith("keep")]
    return {
        "budget": budget,
        "kept": " ".join(kept) or "nothing",
        "predicted_seconds": predicted,
        "measured_seconds": result.wall_seconds,
        "ratio": predicted / result.wall_seconds,
    }
