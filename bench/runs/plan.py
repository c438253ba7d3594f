"""`stablekd bench plan`: whole runs as the planner arranges them under several budgets, against what it predicted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from stablekd_fast import models
from stablekd_fast.bench import core
from stablekd_fast.bench.core import SEED, Case, Contender, Measured, Timing, pinned, scratch
from stablekd_fast.cache.settings import CacheSettings
from stablekd_fast.config import DistillConfig
from stablekd_fast.data import Dataset, open_dataset
from stablekd_fast.planning.rows import decisions, predict
from stablekd_fast.run.distiller import Distiller

TEACHER, STUDENT = "resnet56", "resnet20"
IMAGES, BATCH, EPOCHS, VIEWS = 2560, 128, 4, 1
BUDGETS = ("0", "60MB", "100MB", "150MB", "400MB")
"""Nothing, and what holds one, the other, two, and all three of the teacher's activations."""


def run_plan(
    folder: Path,
    data: str,
    show: Callable[[list[dict]], None],
    rounds: int = 1,
    budgets: Sequence[str] = BUDGETS,
    images: int = IMAGES,
) -> Measured:
    """Run every budget in turn, for `rounds` rounds; return a row per budget and a table with a line per run.

    The baseline is the first budget, which holds nothing. The table says what was kept, and the predicted and measured
    seconds. Leaves nothing in `folder`.
    """
    dataset, runs = open_dataset(data), []
    with scratch(folder) as own, pinned() as pins:
        for number in range(rounds):
            for budget in budgets:
                runs.append({"round": number, **_one(dataset, own / str(number), budget, images)})
    rows = _rows(runs, budgets, f"{TEACHER} -> {STUDENT}, {images} images, {EPOCHS} epochs")
    show(rows)
    return Measured(rows, {"plans and runs": runs}, {"batch": BATCH, "views": VIEWS, **pins})


def _rows(runs: list[dict], budgets: Sequence[str], name: str) -> list[dict]:
    """Return rows of the runs. They train real students, which tests compare bit by bit: no result is checked here."""
    timings = []
    for budget in budgets:
        own = [run for run in runs if run["budget"] == budget]
        extras = {key: own[-1][key] for key in ("kept", "predicted_seconds")}
        contender = Contender(f"budget {budget}", lambda: [], own[-1]["kept"], role="ours", extras=extras)
        timings.append(Timing(contender, 1, [run["measured_seconds"] for run in own]))
    case = Case("plan", name, [timing.contender for timing in timings], f"budget {budgets[0]}", lambda: [], 0.0)
    return core.rows(case, timings)


def _one(dataset: Dataset, scratch: Path, budget: str, images: int) -> dict:
    torch.manual_seed(SEED)
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
    predicted = predict(distiller.decided.costs, distiller.decided.plan).seconds
    kept = [
        row["output"]
        for row in decisions(distiller.decided.costs, distiller.decided.plan)
        if row["decision"].startswith("keep")
    ]
    return {
        "budget": budget,
        "kept": " ".join(kept) or "nothing",
        "predicted_seconds": predicted,
        "measured_seconds": result.wall_seconds,
        "predicted_over_measured": predicted / result.wall_seconds,
    }
