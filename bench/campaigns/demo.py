"""Chooses the settings of the demonstration on Fashion-MNIST: the same six for every method, on held-out images.

    python -m stablekd_fast.bench.campaigns.demo --out DIR [--json FILE]

Trains every method with every setting and several seeds, without the test split, and keeps for each method the setting
with the best mean accuracy on the held-out training images. Interrupted, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from stablekd_fast.bench.campaigns.campaign import Campaign, Task
from stablekd_fast.execution.memory import keep_freed_memory
from stablekd_fast.report import machine, versions
from stablekd_fast.run.demo import DEMONSTRATIONS, FASHION_TEACHER

DATA = "fashion-mnist-small"
RATES, BATCHES, SEEDS = (0.01, 0.02, 0.04), (32, 64), (10, 11)
"""Peak learning rates of AdamW, batch sizes, and seeds that the demonstration does not use."""


def choose(out: Path, methods: list[str]) -> dict:
    """Train all candidates; return every accuracy, and the best setting of each method."""
    common = dict(DEMONSTRATIONS[DATA].common)
    task = Task(
        data=DATA, teacher=DEMONSTRATIONS[DATA].teacher, teacher_weights=str(FASHION_TEACHER),
        student=common.pop("student"), subset=1.0, validation=common.pop("validation"), batch_size=64, precision="auto",
        epochs=common.pop("epochs"),
    )  # fmt: skip
    campaign, rows = Campaign(task), []
    for method in methods:
        for lr in RATES:
            for batch_size in BATCHES:
                own = {**common, "method": method, "batch_size": batch_size, "evaluate_every": 0}
                own["optimizer"] = {"lr": lr}
                runs = [campaign.run(out / f"{method}-{lr}-{batch_size}-{s}", own, s, tuning=True) for s in SEEDS]
                reached = [run["accuracy"] for run in runs if run]
                rows.append({"method": method, "lr": lr, "batch_size": batch_size, "held_out_accuracies": reached})
                print(json.dumps(rows[-1]), flush=True)
    best = {}
    for row in sorted(rows, key=lambda row: statistics.fmean(row["held_out_accuracies"])):
        best[row["method"]] = {"lr": row["lr"], "batch_size": row["batch_size"]}
    return {"chosen": best, "rows": rows, "seeds": SEEDS, "machine": machine(), "versions": versions()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the runs go")
    parser.add_argument("--methods", nargs="*", default=list(DEMONSTRATIONS[DATA].methods))
    parser.add_argument("--json", type=Path, help="file for what was found")
    asked = parser.parse_args()
    keep_freed_memory()
    found = choose(asked.out, asked.methods)
    print(json.dumps(found["chosen"]))
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1) + "\n")
