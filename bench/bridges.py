"""Bridge kinds compared where teacher and student differ in width: exposure gap, recovery after merges, accuracy.

    python -m stablekd_fast.bench.bridges --data CIFAR --teacher-weights FILE --out DIR
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from stablekd_fast.blocks.bridge import KINDS
from stablekd_fast.checkpoint import write_atomically
from stablekd_fast.config import DistillConfig
from stablekd_fast.distiller import Distiller
from stablekd_fast.memory import keep_freed_memory
from stablekd_fast.report import machine, read_events, versions


def measure(arguments, kind: str, seed: int) -> dict:
    """Train one student with bridges of `kind`; its last held-out accuracy and what was seen at each merge."""
    out = Path(arguments.out) / f"{kind}-{seed}"
    config = DistillConfig(
        data=arguments.data,
        teacher=arguments.teacher,
        teacher_weights=arguments.teacher_weights,
        student=arguments.student,
        bridge=kind,
        subset=arguments.subset,
        validation=arguments.validation,
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        precision="fp32",
        seed=seed,
        evaluate_every=0,
        out=str(out),
    )
    if not (out / "results.json").exists():
        Distiller(config).run(progress=False)
    events = read_events(out)
    held_out = [event for event in events if event["kind"] == "evaluate" and event["split"] == "validation"]
    merges = [
        {key: event[key] for key in ("merged", "exposure_gap", "steps_until_recovered", "max_output_difference")}
        for event in events
        if event["kind"] == "merge"
    ]
    return {"bridge": kind, "seed": seed, "held_out_accuracy": held_out[-1]["accuracy"], "merges": merges}


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--teacher", default="resnet56")
    parser.add_argument("--teacher-weights", required=True)
    parser.add_argument("--student", default="resnet20_half")
    parser.add_argument("--subset", type=float, default=5_000)
    parser.add_argument("--validation", type=float, default=2_000)
    parser.add_argument("--epochs", type=float, default=6)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args(words)
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    rows = [measure(arguments, kind, seed) for seed in range(arguments.seeds) for kind in KINDS]
    text = json.dumps({"rows": rows, "machine": machine(), "versions": versions()}, indent=1)
    write_atomically(Path(arguments.out) / "bridges.json", text.encode())
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
