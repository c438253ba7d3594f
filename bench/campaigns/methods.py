"""Trains a student by each method of the field with several seeds: what each adds to the labels alone, and to kd.

    python -m stablekd_fast.bench.campaigns.methods --data CIFAR --teacher-weights FILE --out DIR

All methods share one setting, and each has the options that it comes with: none is tuned. Interrupted, it goes on where
it stopped; several processes side by side share the work.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from stablekd_fast.bench.campaigns.campaign import Campaign, add_task_arguments, recorded_settings, task_of
from stablekd_fast.bench.output import write_document
from stablekd_fast.cache import CacheSettings
from stablekd_fast.report.terminal import print_rows

LIVE = {"cache": CacheSettings(plan="none")}
MIXED = {"mix": "cutmix", **LIVE}

ARMS: dict[str, dict] = {
    **{
        name: {"method": name} for name in ("ce", "kd", "dkd", "dist", "gkd", "logit-std", "at", "fitnet", "crd", "ckd")
    },
    **{name: {"method": name} for name in ("reviewkd", "simkd", "cckd", "r2kd", "dlb", "stablekd")},
    "kdiga": {"method": "kdiga", **LIVE},
    "kd, mixed images": {"method": "kd", **MIXED},
    "mix-kd": {"method": "mix-kd", **MIXED},
    "stablekd, dkd at its head": {"method": "stablekd", "logits": "dkd"},
    "stablekd, at at its cuts": {"method": "stablekd", "feature": "at"},
}
"""Settings beside the task's. `mix-kd` trains on a half of each batch, so its batches are twice as large."""

BASES = ("ce", "kd")


def table(found: dict[str, dict[int, float]]) -> list[dict]:
    """Return a row for each arm: its accuracies in percent by seed, and how far they are above those of the bases."""
    rows = []
    for name, own in found.items():
        row = {"method": name, "accuracies": [round(100 * own[seed], 2) for seed in sorted(own)]}
        row["mean"] = 100 * statistics.fmean(own.values())
        for base in BASES:
            gains = [100 * (own[seed] - other) for seed, other in found.get(base, {}).items() if seed in own]
            if gains and name != base:
                row[f"above {base}"] = statistics.fmean(gains)
                row[f"spread above {base}"] = statistics.stdev(gains) if len(gains) > 1 else None
        rows.append(row)
    return rows


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--views", type=int, default=4, help="views of each image that are shown in turn")
    add_task_arguments(parser, subset=4_000, validation=200, epochs=12, batch_size=64)
    arguments = parser.parse_args(words)
    campaign, out = Campaign(task_of(arguments)), Path(arguments.out)
    found: dict[str, dict[int, float]] = {}
    for seed in range(arguments.seeds):
        for name in arguments.methods:
            settings = {"evaluate_every": 0, "views": arguments.views, **ARMS[name]}
            if name == "mix-kd":
                settings["batch_size"] = 2 * arguments.batch_size
            row = campaign.run(out / f"{name}-{seed}".replace(",", "").replace(" ", "-"), settings, seed)
            if row:
                found.setdefault(name, {})[seed] = row["accuracy"]
    rows = table(found)
    print_rows("methods, not tuned", rows)
    write_document(out / "methods.json", {"rows": rows}, recorded_settings(arguments))


if __name__ == "__main__":
    main()
