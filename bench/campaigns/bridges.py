"""Compares bridge kinds where teacher and student differ in width: exposure gap, recovery after merges, accuracy.

python -m stablekd_fast.bench.campaigns.bridges --data CIFAR --teacher-weights FILE --out DIR
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from stablekd_fast.bench.campaigns.campaign import Campaign, add_task_arguments, task_of
from stablekd_fast.bench.output import write_document
from stablekd_fast.blocks.bridge import FITTED
from stablekd_fast.report import read_events


def measure(campaign: Campaign, out: Path, kind: str, seed: int) -> dict | None:
    """Train one student with bridges of `kind`; return its accuracy on held-out images and what each merge showed.

    None while another process is at it.
    """
    row = campaign.run(out, {"bridge": kind, "evaluate_every": 0}, seed, tuning=True)
    if row is None:
        return None
    merges = [
        {key: event[key] for key in ("merged", "exposure_gap", "steps_until_recovered", "max_output_difference")}
        for event in read_events(out)
        if event["kind"] == "merge"
    ]
    return {"bridge": kind, "seed": seed, "held_out_accuracy": row["accuracy"], "merges": merges}


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_task_arguments(parser, student="resnet20_half", subset=5_000, epochs=6, seeds=2)
    arguments = parser.parse_args(words)
    campaign, out = Campaign(task_of(arguments)), Path(arguments.out)
    runs = [(kind, seed) for seed in range(arguments.seeds) for kind in FITTED]
    rows = [row for kind, seed in runs if (row := measure(campaign, out / f"{kind}-{seed}", kind, seed))]
    write_document(out / "bridges.json", {"rows": rows}, {})
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
