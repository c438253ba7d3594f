"""Chooses the settings of the demonstration on Fashion-MNIST: the same three for every method, on held-out images.

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
RATES, SEEDS = (0.01, 0.02, 0.04), (10,)
"""Peak learning rates of AdamW, and a seed that the demonstration does not use."""


def choose(out: Path, methods: list[str]) -> dict:
    """Train all candidates; return every accuracy, and the best setting of each method."""
    common = dict(DEMONSTRATIONS[DATA].common)
    named = {name: common.pop(name) for name in ("student", "validation", "batch_size", "epochs", "precision")}
    task = Task(
        data=DATA, teacher=DEMONSTRATIONS[DATA].teacher, teacher_weights=str(FASHION_TEACHER), subset=1.0,
        remember=str(out / "rows"), **named,
    )  # fmt: skip
    campaign, rows = Campaign(task), []
    for method in methods:
        for lr in RATES:
            own = {**common, "method": method, "optimizer": {"lr": lr}, "evaluate_every": 0}
            del own["view_seed"]  # the campaign's own
            runs = [campaign.run(out / f"{method}-{lr}-{seed}", own, seed, tuning=True) for seed in SEEDS]
            rows.append({"method": method, "lr": lr, "held_out_accuracies": [run["accuracy"] for run in runs if run]})
            print(json.dumps(rows[-1]), flush=True)
    best = {}
    for row in sorted(rows, key=lambda row: statistics.fmean(row["held_out_accuracies"])):
        best[row["method"]] = {"lr": row["lr"]}
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
